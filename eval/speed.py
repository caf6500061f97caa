"""Time the clustering and the networks' steps beside their peers: python eval/speed.py [--device cuda]

Prints Markdown tables, each with what it measured. The networks have their full size and random weights, which do for
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
from typing import Any, TextIO

import torch
from speed_arithmetic import arithmetic_table
from speed_attention import HEADS, attention_table
from speed_clustering import floor_table, growth_table, peers_table, small_table
from speed_models import MODELS
from speed_step import CANDIDATES, Setting, compiled_table, step_table
from speed_tables import NOT_MEASURED, Table, write

PARTS = ("arithmetic", "small", "clustering", "growth", "attention", "step", "compile")
DEFAULTS: dict[str, dict[str, Any]] = {
    "cpu": {"parts": PARTS[:-1], "model": ["sd15"], "keep": [60, 40], "tokens": [4096]},
    "cuda": {
        "parts": [part for part in PARTS if part != "small"],
        "model": ["sd15", "sdxl"],
        "keep": [60, 40, 25],
        "tokens": [1024, 4096, 16384],
    },
}
SIZES = {
    "cpu": {"sd15": [512], "sdxl": [1024], "pixart-sigma": [1024], "sd3-medium": [1024]},
    "cuda": {"sd15": [512, 1024, 2048], "sdxl": [1024], "pixart-sigma": [1024, 2048], "sd3-medium": [1024]},
}
DTYPES = {"cpu": "float32", "cuda": "float16"}
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
    parts = f"of {', '.join(PARTS)} (default: all; CPU: no compile; GPU: no small)"
    add("--parts", nargs="+", choices=PARTS, metavar="PART", help=parts)
    models = f"of {', '.join(MODELS)} (default: sd15; GPU: sd15 sdxl)"
    add("--model", nargs="+", choices=list(MODELS), metavar="MODEL", help=models)
    blocks = "time so many of a transformer's blocks, which are all alike (default: all)"
    add("--blocks", type=_positive, metavar="N", help=blocks)
    dtypes = "of the steps: float32, float16 or bfloat16 (default: float32; GPU: float16)"
    add("--dtype", choices=["float32", "float16", "bfloat16"], metavar="DTYPE", help=dtypes)
    sizes = "pixels a side (default: 512, others than sd15 1024; GPU: sd15 at 512, 1024 and 2048)"
    add("--size", nargs="+", type=_pixels, metavar="PIXELS", help=sizes)
    keeps = "percentages of the tokens kept; all but step and attention take the first (default: 60 40; GPU: 60 40 25)"
    add("--keep", nargs="+", type=_percent, metavar="PERCENT", help=keeps)
    candidates = f"of {', '.join(CANDIDATES)}, beside the unpatched network (default: all that fit it)"
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
    dtype = getattr(torch, args.dtype or DTYPES[device])
    settings = [Setting(*each, device, dtype, MODELS[each[0]].blocks and args.blocks) for each in models]
    if "arithmetic" in args.parts:
        yield arithmetic_table(models)
    if "small" in args.parts:
        yield small_table(first, repeats)
    if "clustering" in args.parts and device == "cuda":
        yield floor_table(args.tokens, first, repeats)
    elif "clustering" in args.parts:
        yield from (peers_table(num_tokens, first, repeats) for num_tokens in args.tokens)
    if "growth" in args.parts:
        yield growth_table(sorted(set(args.growth_tokens)), first, repeats, device)
    if "attention" in args.parts:
        unets = [each for each in models if each[0] in HEADS]
        yield from (attention_table(model, size, args.keep, repeats, device) for model, size in unets)
    if "step" in args.parts:
        yield from (step_table(setting, args.keep, args.candidates, repeats) for setting in settings)
    if "compile" in args.parts:
        yield compiled_table(settings[0], first, repeats)


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
