"""Draw the same pictures unmerged and merged, side by side, and print seconds and fidelity.

    python examples/generate.py
    python examples/generate.py --model stable-diffusion-v1-5/stable-diffusion-v1-5 --prompt "a fox in the snow"

Without `--model` it draws emoji with the small Stable Diffusion that ships in `examples/emoji_diffusion`.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from pipeline import EMOJI, load

from atc_diffusion import ATCConfig, MergeConfig, ToMeConfig, patched
from atc_diffusion.clustering import LINKAGES

UNMERGED = (1.0, 1.0)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=EMOJI, help="hub id or folder of a diffusers pipeline")
    parser.add_argument("--prompt", nargs="+", default=["red apple", "fox", "penguin"])
    keep = "percent of tokens kept, of queries and of keys: 100/10, or 50 for both (default: 100/10 50/10)"
    parser.add_argument("--keep", nargs="+", type=shares, default=[(1.0, 0.1), (0.5, 0.1)], help=keep)
    parser.add_argument("--method", choices=["atc", "tome"], default="atc")
    parser.add_argument("--linkage", choices=LINKAGES, help="of ATC (default: average)")
    parser.add_argument("--steps", type=int, default=20, help="denoising steps")
    parser.add_argument("--guidance", type=float, default=3.0, help="classifier-free guidance scale")
    parser.add_argument("--size", type=int, help="side in pixels (default: the model's)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("generate.png"), help="the labelled picture")
    return parser.parse_args()


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
    if args.method == "tome" and args.linkage:
        raise ValueError(f"--linkage {args.linkage} is ATC's; leave it out with --method tome")
    if args.steps < 1:
        raise ValueError(f"--steps must be at least 1, got {args.steps}")
    if not args.out.parent.is_dir():
        raise ValueError(f"cannot write {str(args.out)!r}: there is no folder {str(args.out.parent)!r}")


def configurations(args: argparse.Namespace) -> dict[str, MergeConfig]:
    """A configuration for every pair of shares, the unmerged model first; by what is kept."""
    method = ToMeConfig if args.method == "tome" else ATCConfig
    options = {"linkage": args.linkage} if args.linkage else {}
    pairs = dict.fromkeys([UNMERGED, *args.keep])
    return {describe(*pair): method(r=pair[0], r_keys=pair[1], **options) for pair in pairs}


def describe(queries: float, keys: float) -> str:
    if (queries, keys) == UNMERGED:
        return "unmerged"
    return f"{queries:.0%} of tokens" if queries == keys else f"{queries:.0%} of queries, {keys:.0%} of keys"


def draw(pipe: Any, args: argparse.Namespace, steps: int) -> tuple[list[Image.Image], float]:
    """The pictures of all prompts, every one from the same seed, and the seconds they took."""
    generators = [torch.Generator().manual_seed(args.seed) for _ in args.prompt]
    start = time.perf_counter()
    pictures = pipe(
        args.prompt,
        height=args.size,
        width=args.size,
        num_inference_steps=steps,
        guidance_scale=args.guidance,
        generator=generators,
    ).images
    return pictures, time.perf_counter() - start


def psnr(a: list[Image.Image], b: list[Image.Image]) -> float:
    """Peak signal-to-noise ratio in dB, of the mean squared error over all pictures."""
    error = np.mean([(np.asarray(x, dtype=float) - np.asarray(y, dtype=float)) ** 2 for x, y in zip(a, b, strict=True)])
    return float(10 * np.log10(255**2 / error)) if error else float("inf")


def contact_sheet(columns: dict[str, list[Image.Image]], side: int = 256, margin: int = 28) -> Image.Image:
    """Pictures under the label of their column."""
    rows = len(next(iter(columns.values())))
    sheet = Image.new("RGB", (side * len(columns), margin + side * rows), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=14)
    for x, (label, pictures) in enumerate(columns.items()):
        pen.text(((x + 0.5) * side, margin / 2), label, "black", font, anchor="mm")
        for y, picture in enumerate(pictures):
            sheet.paste(picture.resize((side, side), Image.Resampling.BICUBIC), (x * side, margin + y * side))
    return sheet


def main() -> None:
    args = parse_arguments()
    check(args)
    configs = configurations(args)
    pipe = load(args.model)
    draw(pipe, args, steps=2)  # warm up
    columns: dict[str, list[Image.Image]] = {}
    unmerged: tuple[list[Image.Image], float] | None = None
    for kept, config in configs.items():
        with patched(pipe, config):
            pictures, seconds = draw(pipe, args, args.steps)
        unmerged = unmerged or (pictures, seconds)
        line = f"{kept:32} {seconds / len(pictures):6.2f} s/picture"
        if pictures is not unmerged[0]:
            line += f"  x {seconds / unmerged[1]:.2f}  {psnr(pictures, unmerged[0]):.1f} dB"
        print(line)
        columns[kept] = pictures
    contact_sheet(columns).save(args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"generate.py: {error}")
