"""Draw the same pictures unmerged and merged, side by side, and print seconds and fidelity.

    python examples/generate.py
    python examples/generate.py --model stable-diffusion-v1-5/stable-diffusion-v1-5 --prompt "a fox in the snow"

Without `--model` it draws emoji with the small Stable Diffusion that ships in `examples/emoji_diffusion`.
"""

import argparse
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from atc_diffusion import ATCConfig, MergeConfig, ToMeConfig, patched
from atc_diffusion.clustering import LINKAGES, on_compilation
from atc_diffusion.fidelity import psnr
from door import door
from pipeline import EMOJI, load

SIDE, MARGIN = 256, 28  # pixels of a picture and of a line of text
GAIN = 20  # of differences
Column = tuple[str, list[Image.Image], str]  # name, pictures, figures
FORMATS = (".png", ".jpg", ".jpeg", ".webp")


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=EMOJI, help="hub id or folder of a diffusers pipeline")
    parser.add_argument("--prompt", nargs="+", default=["red apple", "fox", "penguin"])
    keep = "percent of tokens kept, of queries and of keys: 100/10, or 50 for both (default: the presets)"
    parser.add_argument("--keep", nargs="+", type=shares, help=keep)
    parser.add_argument("--method", choices=["atc", "tome"], default="atc")
    parser.add_argument("--linkage", choices=LINKAGES, help="of ATC (default: average)")
    parser.add_argument("--steps", type=int, default=20, help="denoising steps")
    parser.add_argument("--guidance", type=float, default=3.0, help="classifier-free guidance scale")
    parser.add_argument("--size", type=int, help="side in pixels (default: the model's)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("generate.png"), help="the labelled picture")
    return parser.parse_args(arguments)


def shares(text: str) -> tuple[float, float]:
    """The shares of queries and keys that "50/10", or "50" for both, asks for."""
    queries, _, keys = text.partition("/")
    try:
        percentages = float(queries), float(keys or queries)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected percentages such as 50 or 100/10, got {text!r}") from None
    for percentage in percentages:
        if not 1 <= percentage <= 100:
            hint = f"; did you mean {100 * percentage:g}?" if 0 < percentage < 1 else ""
            raise argparse.ArgumentTypeError(f"expected percentages from 1 to 100, got {percentage:g}{hint}")
    return percentages[0] / 100, percentages[1] / 100


def check(args: argparse.Namespace) -> None:
    """Refuse what would fail only after the pictures were drawn, or mean something else."""
    if not args.keep and (args.method == "tome" or args.linkage):
        raise ValueError("--method and --linkage need --keep, such as --keep 50")
    if args.method == "tome" and args.linkage:
        raise ValueError(f"--linkage {args.linkage} is ATC's; leave it out with --method tome")
    if args.steps < 1:
        raise ValueError(f"--steps must be at least 1, got {args.steps}")
    if args.out.is_dir() or args.out.suffix.lower() not in FORMATS:
        raise ValueError(f"--out {args.out} must be a file that ends in {', '.join(FORMATS)}")
    if not args.out.parent.is_dir():
        raise ValueError(f"cannot write {str(args.out)!r}: there is no folder {str(args.out.parent)!r}")


def configurations(args: argparse.Namespace) -> dict[str, MergeConfig | None]:
    """A configuration for every row, by its name; None for the unmerged model, which is first."""
    if not args.keep:
        return {"unmerged": None, "ATCConfig.fast()": ATCConfig.fast(), "ATCConfig.faster()": ATCConfig.faster()}
    method = ToMeConfig if args.method == "tome" else ATCConfig
    options = {"linkage": args.linkage} if args.linkage else {}
    merged = {describe(*pair): method(r=pair[0], r_keys=pair[1], **options) for pair in args.keep if pair != (1, 1)}
    return {"unmerged": None, **merged}


def describe(queries: float, keys: float) -> str:
    return f"{queries:.0%} of tokens" if queries == keys else f"{queries:.0%} of queries, {keys:.0%} of keys"


@dataclass(frozen=True)
class Run:
    """The pictures of all prompts, and the seconds that each took."""

    pictures: list[Image.Image]
    seconds: float

    def beside(self, unmerged: "Run") -> str:
        """The figures in words."""
        if self is unmerged:
            return f"{self.seconds:.2f} s/picture"
        nearness = psnr(stacked(self.pictures), stacked(unmerged.pictures))
        return f"{self.seconds:.2f} s/picture  x {self.seconds / unmerged.seconds:.2f}  {nearness:.1f} dB"

    def differences(self, unmerged: "Run") -> list[Image.Image]:
        """Absolute differences, `GAIN` times as strong."""
        error = np.abs(stacked(self.pictures).astype(int) - stacked(unmerged.pictures))
        return [Image.fromarray(each) for each in (GAIN * error).clip(max=255).astype(np.uint8)]


def stacked(pictures: list[Image.Image]) -> Any:
    return np.stack([np.asarray(each.convert("RGB")) for each in pictures])


def draw(pipe: Any, args: argparse.Namespace, config: MergeConfig | None, steps: int) -> Run:
    """Draw all prompts, each from the same seed."""
    generators = [torch.Generator().manual_seed(args.seed) for _ in args.prompt]
    merging: AbstractContextManager[object] = nullcontext() if config is None else patched(pipe, config)
    with merging:
        start = time.perf_counter()
        pictures = pipe(
            args.prompt,
            height=args.size,
            width=args.size,
            num_inference_steps=steps,
            guidance_scale=args.guidance,
            generator=generators,
        ).images
        return Run(pictures, (time.perf_counter() - start) / len(pictures))


def warm_up(pipe: Any, args: argparse.Namespace, configs: Mapping[str, MergeConfig | None]) -> None:
    """Two steps with each configuration, so that nothing is compiled or tuned while time is taken."""
    say_once = cache(lambda: print("compiling (once) ...", flush=True))
    with on_compilation(say_once):
        for config in configs.values():
            draw(pipe, args, config, steps=2)


def contact_sheet(columns: Sequence[Column]) -> Image.Image:
    """Columns of pictures, each under its name and above its figures."""
    rows = len(columns[0][1])
    sheet = Image.new("RGB", (SIDE * len(columns), SIDE * rows + 2 * MARGIN), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=13)
    for x, (name, pictures, figures) in enumerate(columns):
        for text, middle in ((name, MARGIN / 2), (figures, sheet.height - MARGIN / 2)):
            pen.text(((x + 0.5) * SIDE, middle), text, "black", font, anchor="mm")
        for y, picture in enumerate(pictures):
            sheet.paste(picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC), (x * SIDE, MARGIN + y * SIDE))
    return sheet


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_arguments(arguments)
    with door("generate.py"):
        run(args)


def run(args: argparse.Namespace) -> None:
    check(args)
    configs = configurations(args)
    pipe = load(args.model)
    warm_up(pipe, args, configs)
    runs: dict[str, Run] = {}
    columns: list[Column] = []
    for kept, config in configs.items():
        run = runs[kept] = draw(pipe, args, config, args.steps)
        figures = run.beside(runs["unmerged"])
        print(f"{kept:32} {figures}", flush=True)
        columns.append((kept, run.pictures, figures))
        if config is not None:
            columns.append((f"difference x {GAIN}", run.differences(runs["unmerged"]), ""))
    contact_sheet(columns).save(args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
