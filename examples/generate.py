"""Draw the same pictures with all tokens and with fewer, side by side.

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
import transformers
from diffusers import DiffusionPipeline
from diffusers.utils import logging
from PIL import Image, ImageDraw, ImageFont

from atc_diffusion import ATCConfig, MergeConfig, ToMeConfig, patched
from atc_diffusion.clustering import LINKAGES

EMOJI = Path(__file__).parent / "emoji_diffusion"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(EMOJI), help="hub id or folder of a diffusers pipeline")
    parser.add_argument("--prompt", nargs="+", default=["red apple", "fox", "penguin", "wrapped gift"])
    parser.add_argument("--keep", nargs="+", type=float, default=[100, 60, 25], help="percent of the tokens kept")
    parser.add_argument("--method", choices=["atc", "tome"], default="atc")
    parser.add_argument("--linkage", choices=LINKAGES, help="of ATC (default: average)")
    parser.add_argument("--steps", type=int, default=25, help="denoising steps")
    parser.add_argument("--guidance", type=float, default=3.0, help="classifier-free guidance scale")
    parser.add_argument("--size", type=int, help="side in pixels (default: the model's)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("generate.png"), help="the labelled picture")
    return parser.parse_args()


def check(args: argparse.Namespace) -> None:
    """Refuse what would fail only after the pictures were drawn, or mean something else."""
    if args.method == "tome" and args.linkage:
        raise ValueError(f"--linkage {args.linkage} is ATC's; leave it out with --method tome")
    if any(0 < keep < 1 for keep in args.keep):
        raise ValueError(f"--keep is in percent, got {min(args.keep):g}; did you mean {100 * min(args.keep):g}?")
    if args.steps < 1:
        raise ValueError(f"--steps must be at least 1, got {args.steps}")
    if not args.out.parent.is_dir():
        raise ValueError(f"cannot write {str(args.out)!r}: there is no folder {str(args.out.parent)!r}")


def configurations(args: argparse.Namespace) -> dict[float, MergeConfig]:
    """One configuration for every percentage, 100 first."""
    method = ToMeConfig if args.method == "tome" else ATCConfig
    options = {"linkage": args.linkage} if args.linkage else {}
    return {keep: method(r=keep / 100, **options) for keep in dict.fromkeys([100.0, *args.keep])}


def load(model: str) -> Any:
    device, dtype = ("cuda", torch.float16) if torch.cuda.is_available() else ("cpu", torch.float32)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    transformers.logging.disable_progress_bar()
    try:
        pipe = DiffusionPipeline.from_pretrained(model)
    except OSError as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"cannot load {model!r}; give a folder with a pipeline, or go online ({reason})") from error
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device, dtype)


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


def contact_sheet(columns: dict[str, list[Image.Image]], side: int = 192, margin: int = 28) -> Image.Image:
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
    reference: list[Image.Image] = []
    for keep, config in configs.items():
        with patched(pipe, config):
            pictures, seconds = draw(pipe, args, args.steps)
        reference = reference or pictures
        fidelity = "the reference" if keep == 100 else f"{psnr(pictures, reference):.1f} dB"
        print(f"r = {config.r:<5g} {seconds / len(pictures):6.2f} s/picture   {fidelity}")
        columns[f"r = {config.r:g}: {fidelity}"] = pictures
    contact_sheet(columns).save(args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"generate.py: {error}")
