"""Draw the same images unmerged and merged, side by side, and print seconds and fidelity.

    python examples/generate.py
    python examples/generate.py --model stable-diffusion-v1-5/stable-diffusion-v1-5 --prompt "a fox in the snow" --r 0.5

Without `--model` it draws emoji with the small Stable Diffusion that ships in `examples/emoji_diffusion`. It compares
the presets `ATCConfig.fast()` and `ATCConfig.faster()`, or the setting that you give.
"""

import argparse
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from atc_diffusion import ATCConfig, MergeConfig, patched, psnr
from atc_diffusion.clustering import LINKAGES, on_compilation
from atc_diffusion.commands import Several, check_file, one_sentence
from pipeline import check_drawing, draw_images, load, make_parser

SIDE, HEAD, FOOT = 256, 44, 84  # pixels: of an image, and of the text above and below a column
GAIN = 20  # of differences
FORMATS = (".png", ".jpg", ".jpeg", ".webp")


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument(
        "--prompt", action=Several, default=["rainbow", "butterfly", "wrapped gift"], help="what to draw"
    )
    parser.add_argument("--r", type=float, help="fraction of queries kept, as in ATCConfig, instead of the presets")
    parser.add_argument("--r-keys", type=float, help="fraction of keys and values kept, if it differs from --r")
    parser.add_argument("--linkage", choices=LINKAGES, default="average", help="for --r and --r-keys")
    parser.add_argument("--seed", type=int, default=0, help="of every image")
    parser.add_argument("--out", type=Path, default=Path("generate.png"), help="the labelled image")
    return parser.parse_args(arguments)


def configurations(args: argparse.Namespace) -> dict[str, MergeConfig | None]:
    """A configuration for every column, by its name; None for the unmerged model, which is first."""
    if args.r is None and args.r_keys is None:
        return {"unmerged": None, "fast()": ATCConfig.fast(), "faster()": ATCConfig.faster()}
    config = ATCConfig(r=1.0 if args.r is None else args.r, r_keys=args.r_keys, linkage=args.linkage)
    return {"unmerged": None, str(config).removeprefix("ATCConfig"): config}


@dataclass(frozen=True)
class Run:
    """The images of all prompts, and the seconds that each took."""

    images: list[Image.Image]
    seconds: float

    @property
    def pixels(self) -> Any:
        return np.stack([np.asarray(each.convert("RGB")) for each in self.images])

    def figures(self, unmerged: "Run") -> tuple[str, str]:
        """Seconds, and, if it is another run, its ratio and PSNR to the unmerged one."""
        if self is unmerged:
            return f"{self.seconds:.2f} s per image", ""
        fidelity = psnr(self.pixels, unmerged.pixels)
        return f"{self.seconds:.2f} s per image", f"{self.seconds / unmerged.seconds:.2f} x, {fidelity:.1f} dB"

    def differences(self, unmerged: "Run") -> Image.Image:
        """Absolute differences of all images, `GAIN` times as strong, in a row."""
        error = np.abs(self.pixels.astype(int) - unmerged.pixels)
        return Image.fromarray(np.hstack((GAIN * error).clip(max=255)).astype(np.uint8))


def draw(pipe: Any, args: argparse.Namespace, config: MergeConfig | None, steps: int) -> Run:
    """Draw all prompts, each from the same seed."""
    with patched(pipe, config) if config else nullcontext():
        images, seconds = draw_images(pipe, args.prompt, args.seed, args.size, steps, guidance_scale=args.guidance)
    return Run(images, seconds / len(images))


def warm_up(pipe: Any, args: argparse.Namespace, configs: Mapping[str, MergeConfig | None]) -> None:
    """Two steps with each configuration, so that nothing is compiled or tuned while time is taken."""
    say_once = cache(lambda: print("compiling (once) ...", flush=True))
    with on_compilation(say_once):
        for config in configs.values():
            draw(pipe, args, config, steps=2)


def sheet(runs: Mapping[str, Run]) -> Image.Image:
    """A column of images for each run, under its name and above its figures, and a strip of differences."""
    unmerged = runs["unmerged"]
    rows, strip = len(unmerged.images), SIDE // len(unmerged.images)
    canvas = Image.new("RGB", (SIDE * len(runs), HEAD + SIDE * rows + FOOT + strip), "white")
    for x, (name, run) in enumerate(runs.items()):
        for y, image in enumerate(run.images):
            canvas.paste(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC), (x * SIDE, HEAD + y * SIDE))
        seconds, factor = run.figures(unmerged)
        write(canvas, name, (x + 0.5, HEAD / 2), 24)
        write(canvas, seconds, (x + 0.5, HEAD + SIDE * rows + 24), 26)
        write(canvas, factor, (x + 0.5, HEAD + SIDE * rows + 58), 30)
        if run is unmerged:
            write(canvas, f"differences x {GAIN}", (x + 0.5, HEAD + SIDE * rows + FOOT + strip / 2), 20)
        else:
            canvas.paste(run.differences(unmerged).resize((SIDE, strip)), (x * SIDE, HEAD + SIDE * rows + FOOT))
    return canvas


def write(canvas: Image.Image, text: str, place: tuple[float, float], size: float) -> None:
    """Write `text` around `place`, a column and pixels from the top, no larger than fits into the column."""
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=size)
    font = ImageFont.load_default(size=size * min(1.0, (SIDE - 8) / max(1.0, font.getlength(text))))
    pen.text((place[0] * SIDE, place[1]), text, "black", font, anchor="mm")


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_arguments(arguments)
    with one_sentence("generate.py"):
        check_drawing(args)
        check_file("--out", args.out, *FORMATS)
        configs = configurations(args)
        pipe = load(args.model)
        warm_up(pipe, args, configs)
        runs: dict[str, Run] = {}
        for name, config in configs.items():
            runs[name] = draw(pipe, args, config, args.steps)
            print(f"{name:24} {', '.join(filter(None, runs[name].figures(runs['unmerged'])))}", flush=True)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        sheet(runs).save(args.out)
        print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
