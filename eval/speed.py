"""Time the clustering and the UNets' steps beside their peers: python eval/speed.py [--device cuda]

Prints Markdown tables, each with what it measured. The UNets have their full size and random weights, which do for
timing, but their features are not those of images: clustering may take more or fewer rounds there. Ratios are of
medians from one run in which the candidates took turns.

The defaults take a quarter of an hour on two CPU cores. On a GPU they are all there is, and the tables that take
longest, of 2048 x 2048 pixels and of torch.compile, come last; each table is printed once it is measured.
"""

import argparse
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import TextIO

import torch
from speed_arithmetic import arithmetic_table
from speed_attention import attention_table
from speed_clustering import floor_table, growth_table, peers_table
from speed_tables import NOT_MEASURED, Table, write
from speed_unet import CANDIDATES, UNET, compiled_table, step_table

PARTS = ("arithmetic", "clustering", "growth", "attention", "step", "compile")
DEFAULTS = {
    "cpu": {"parts": PARTS[:-1], "model": ["sd15"], "keep": [60, 40], "tokens": [4096]},
    "cuda": {"parts": PARTS, "model": ["sd15", "sdxl"], "keep": [60, 40, 25], "tokens": [1024, 4096, 16384]},
}
SIZES = {
    "cpu": {"sd15": [512], "sdxl": [1024]},
    "cuda": {"sd15": [512, 1024, 2048], "sdxl": [1024]},
}
GROWTH = [1024, 2048, 4096, 8192, 16384]


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    if args.device == "cuda" and not args.dry_run and not torch.cuda.is_available():
        sys.exit("PyTorch finds no CUDA GPU here; run this where there is one, or add --dry-run for empty tables")
    with ExitStack() as stack:
        files: list[TextIO] = [sys.stdout]
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            files.append(stack.enter_context(args.out.open("w", encoding="utf-8")))
        write([unmeasured(args) if args.dry_run else conditions(args.device)], files)
        for table in tables(args):
            write(table.lines(args.dry_run), files)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = make_parser()
    parser.set_defaults(**DEFAULTS[parser.parse_args(arguments).device])
    return parser.parse_args(arguments)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", choices=list(DEFAULTS), default="cpu", help="(default: cpu)")
    parts = f"of {', '.join(PARTS)} (default: all; CPU: no compile)"
    add("--parts", nargs="+", choices=PARTS, metavar="PART", help=parts)
    models = f"of {', '.join(UNET)} (default: sd15; GPU: both)"
    add("--model", nargs="+", choices=list(UNET), metavar="MODEL", help=models)
    sizes = "pixels a side (default: 512, for SDXL 1024; GPU: sd15 at 512, 1024 and 2048)"
    add("--size", nargs="+", type=_pixels, metavar="PIXELS", help=sizes)
    keeps = "percentages of the tokens kept; all but step and attention take the first (default: 60 40; GPU: 60 40 25)"
    add("--keep", nargs="+", type=_percent, metavar="PERCENT", help=keeps)
    candidates = f"of {', '.join(CANDIDATES)}, beside the unpatched UNet (default: all)"
    add("--candidates", nargs="*", choices=CANDIDATES, default=CANDIDATES, metavar="NAME", help=candidates)
    tokens = "sizes of the clustering problems (default: 4096; GPU: 1024 4096 16384)"
    add("--tokens", nargs="+", type=_positive, metavar="N", help=tokens)
    growth = "sizes of those that grow (default: 1024 2048 4096 8192 16384)"
    add("--growth-tokens", nargs="+", type=_positive, default=GROWTH, metavar="N", help=growth)
    add("--repeats", type=_positive, default=3, metavar="N", help="timings of every candidate (default: 3)")
    add("--dry-run", action="store_true", help=f"measure nothing: '{NOT_MEASURED}' in every cell")
    add("--out", type=Path, metavar="FILE", help="a copy of what is printed")
    return parser


def tables(args: argparse.Namespace) -> Iterator[Table]:
    """The chosen tables, about in the order of the time that they take."""
    first, repeats, device = args.keep[0], args.repeats, args.device
    models = [(model, size) for model in args.model for size in args.size or SIZES[device][model]]
    models.sort(key=lambda each: each[1])
    if "arithmetic" in args.parts:
        yield arithmetic_table(models)
    if "clustering" in args.parts and device == "cuda":
        yield floor_table(args.tokens, first, repeats)
    elif "clustering" in args.parts:
        yield from (peers_table(num_tokens, first, repeats) for num_tokens in args.tokens)
    if "growth" in args.parts:
        yield growth_table(sorted(set(args.growth_tokens)), first, repeats, device)
    if "attention" in args.parts:
        yield from (attention_table(model, size, args.keep, repeats, device) for model, size in models)
    if "step" in args.parts:
        yield from (step_table(model, size, args.keep, args.candidates, repeats, device) for model, size in models)
    if "compile" in args.parts:
        yield compiled_table(*models[0], first, repeats, device)


def conditions(device: str) -> str:
    packages = ("torch", "diffusers", "scipy", "fastcluster", "scikit-learn", "tomesd")
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    processor = f"{torch.get_num_threads()} CPU threads ({platform.processor() or platform.machine()})"
    gpu = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}, " if device == "cuda" else ""
    return f"{gpu}{processor}; Python {platform.python_version()}, {versions}."


def unmeasured(args: argparse.Namespace) -> str:
    return f"Not measured yet; `python eval/speed.py --device {args.device}` fills this in."


def _positive(text: str) -> int:
    return _whole(text, "a whole number from 1 up", lambda value: value >= 1)


def _percent(text: str) -> int:
    return _whole(text, "a whole percentage from 1 to 100", lambda value: 1 <= value <= 100)


def _pixels(text: str) -> int:
    return _whole(text, "a multiple of 64 pixels", lambda value: value > 0 and value % 64 == 0)


def _whole(text: str, expected: str, fits: Callable[[int], bool]) -> int:
    if not text.isdecimal() or not fits(int(text)):
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
    return int(text)


if __name__ == "__main__":
    main()
