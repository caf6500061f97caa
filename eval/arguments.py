"""The command line of the experiment."""

import argparse
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from functools import wraps
from pathlib import Path
from typing import Any

import yaml
from configurations import METHODS, Configuration, Shares, grid, with_rivals
from features import LAYERS, RESIZERS
from rivals import Rival

from atc_diffusion import ATCConfig

STABLE_DIFFUSION = "stable-diffusion-v1-5/stable-diffusion-v1-5"
# WordNet's lemma lists, line i for class i, as in the ATC authors' public code (github.com/JoakimHaurum/ATC).
IMAGENET_NAMES = Path(__file__).with_name("imagenet_class_names.txt")
EMOJI_DIFFUSION = Path(__file__).resolve().parents[1] / "examples" / "emoji_diffusion"
DEMO = {  # the experiment in small, on the model of this repository
    "model": str(EMOJI_DIFFUSION),
    "class_names": EMOJI_DIFFUSION / "things.txt",
    "prompt": "{}",
    "reference": EMOJI_DIFFUSION / "pictures",
    "steps": 20,
    "guidance": 3.0,
    "batch_size": 4,
    "classes": "12",
    "images_per_class": 1,
    "keep": [(0.5, None), (1.0, 0.1)],
    "method": ["paper", "atc"],
    "rival": [Rival("steps", 14)],
    "time": 1,
    "features": "efficientnet-lite0",
    "out": Path("out/demo"),
}


def parse(description: str | None, arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; `--demo` gives other defaults, not other meanings."""
    parser = make_parser(description)
    if parser.parse_args(arguments).demo:
        parser.set_defaults(**DEMO)
    return parser.parse_args(arguments)


def make_parser(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", action="store_true", help="the small emoji model of this repository: offline, no GPU")
    parser.add_argument("--list", action="store_true", help="print seed, file and prompt of every picture, and stop")
    add_way_options(parser.add_argument_group("what is compared"))
    add_output(parser.add_argument_group("where it goes"))
    add_pictures(parser.add_argument_group("the pictures"))
    add_sampling(parser.add_argument_group("how they are sampled"))
    add_scoring(parser.add_argument_group("how they are scored"))
    return parser


def add_way_options(group: argparse._ArgumentGroup) -> None:
    """The options that say what is compared."""
    add = group.add_argument
    percent = "percent of tokens kept, of queries and of keys: 100/10, or 50 for both (default: 40 50 60 70 80 90)"
    default = [(keep / 100, None) for keep in (40, 50, 60, 70, 80, 90)]
    add("--keep", type=_argument(parse_shares), nargs="+", default=default, metavar="PERCENT", help=percent)
    methods = (
        "atc: ATCConfig's defaults; paper: the paper's setting; tome: ToMe as in its authors' code; kmedoids and "
        "dpc-knn: the paper's other baselines; none: only the unmerged model, which is always drawn (default: paper)"
    )
    add("--method", nargs="+", choices=[*METHODS, "none"], default=["paper"], help=methods)
    sets = (
        "fields of ATCConfig with the values to try, such as linkage=average,ward refresh_every=3,5; all combinations "
        "are drawn; other methods take the fields that they have"
    )
    add("--set", nargs="+", default=[], metavar="FIELD=VALUES", help=sets)
    rivals = (
        "other ways to draw faster: steps:14 (fewer steps), todo:2 and pooled:2 (keys downsampled by that factor), "
        "tomesd:50 (percent kept), deepcache:3 (interval), ca-tome:0.7 (least similarity)"
    )
    add("--rival", nargs="+", type=_argument(Rival.parse), default=[], metavar="NAME:STRENGTH", help=rivals)
    both = "rivals that every way of merging is also drawn together with, such as deepcache:2"
    add(
        "--with",
        nargs="+",
        type=_argument(Rival.parse),
        default=[],
        dest="together",
        metavar="NAME:STRENGTH",
        help=both,
    )


def add_output(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--out", type=Path, default=Path("out/fid"), metavar="DIR", help="for pictures and features (default: out/fid)")
    add("--report", type=Path, metavar="DIR", help="for the report (default: the same)")


def add_pictures(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    classes = "'all', a count ('100': the first hundred) or a list of indices ('3,7,12') (default: all)"
    add("--classes", default="all", metavar="WHICH", help=classes)
    add("--images-per-class", type=positive, default=2, metavar="N", help="pictures of each class (default: 2)")
    names = "names of the classes, a line each (default: the 1000 of ImageNet)"
    add("--class-names", type=Path, default=IMAGENET_NAMES, metavar="FILE", help=names)
    prompt = "prompt with {} for the class name (default: %(default)r)"
    add("--prompt", default="A high quality photograph of a {}.", metavar="TEXT", help=prompt)
    add("--seed", type=int, default=0, help="added to every picture's own seed (default: 0)")


def add_sampling(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--model", default=STABLE_DIFFUSION, help="hub id or folder of a pipeline (default: %(default)s)")
    add("--steps", type=positive, default=50, help="denoising steps (default: 50)")
    add("--guidance", type=float, default=7.5, help="classifier-free guidance scale (default: 7.5)")
    add("--size", type=positive, help="height and width in pixels (default: the model's own, 512 in SD v1.5)")
    batch = "prompts in a batch; part of what a picture is, for rounding can depend on it (default: 8)"
    add("--batch-size", type=positive, default=8, metavar="N", help=batch)
    rounds = "time N batches of each configuration, in turn, with nothing else running (default: 0, no times)"
    add("--time", type=_count, default=0, metavar="N", help=rounds)
    add_device(group)


def add_device(group: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    add = group.add_argument
    dtypes = ["float16", "bfloat16", "float32"]
    add("--dtype", choices=dtypes, help="of the model (default: float16 on a CUDA GPU, else float32)")
    devices = ["auto", "cpu", "cuda", "mps"]
    add("--device", choices=devices, default="auto", help="(default: auto, the fastest there is)")


def add_scoring(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--reference", type=Path, metavar="DIR", help="the reference pictures; eval/reference.py makes the paper's")
    network = "network whose features are compared; weights of the second come with a package (default: inception)"
    add("--features", choices=list(LAYERS), default="inception", help=network)
    weights = "torch-fidelity's Inception weights (default: downloaded)"
    add("--inception-weights", type=Path, metavar="FILE", help=weights)
    resize = "as in the original FID, or as clean-fid, which the paper used (default: tensorflow)"
    add("--resize", choices=list(RESIZERS), default="tensorflow", help=resize)
    add("--bootstrap", type=_several, default=200, metavar="N", help="draws for the intervals (default: 200)")
    add("--show", type=int, nargs="+", metavar="CLASS", help="classes to show pictures of (default: the first)")
    add("--lpips", action="store_true", help="LPIPS too, with AlexNet's weights, which are downloaded")


def positive(text: str, least: int = 1) -> int:
    """A whole number from the command line, for argparse."""
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"expected a whole number from {least} up, got {text!r}")
    return int(text)


def _several(text: str) -> int:
    return positive(text, least=2)


def _count(text: str) -> int:
    return positive(text, least=0)


def parse_shares(text: str) -> Shares:
    """The shares of queries and of keys kept that "100/10" asks for, in percent; "50" is for both.

    Raises:
        ValueError: if `text` is not of this form or not from 1 to 100.
    """
    queries, _, keys = text.partition("/")
    return _share(queries), _share(keys) if keys else None


def _share(text: str) -> float:
    try:
        percent = float(text)
    except ValueError:
        raise ValueError(f"expected percentages of tokens kept, such as 50 or 100/10, got {text!r}") from None
    if not 1 <= percent <= 100:
        hint = f"; did you mean {100 * percent:g}?" if 0 < percent < 1 else ""
        raise ValueError(f"expected percentages of tokens kept, from 1 to 100, got {percent:g}{hint}")
    return percent / 100


def parse_options(texts: Iterable[str]) -> dict[str, list[Any]]:
    """Fields of `ATCConfig` with the values to try, from texts such as "linkage=average,ward".

    Values are YAML: `0.1`, `off`, `null`, `keys`.

    Raises:
        ValueError: for a text of another form, or a field that `ATCConfig` lacks.
    """
    return dict(map(_parse_option, texts))


def _parse_option(text: str) -> tuple[str, list[Any]]:
    field, _, values = text.partition("=")
    known = [each.name for each in fields(ATCConfig) if each.name not in ("r", "r_keys")]
    if field not in known or not values:
        raise ValueError(f"--set takes FIELD=VALUE[,VALUE...] with a field of {', '.join(known)}; got {text!r}")
    parsed = yaml.safe_load(f"[{values}]")
    if any(isinstance(value, dict | list) for value in parsed):
        raise ValueError(f"--set takes plain values, got {text!r}")
    return field, parsed


def configurations(args: argparse.Namespace) -> list[Configuration]:
    """All ways to draw that the options of `add_way_options` ask for."""
    merged = grid(args.method, args.keep, parse_options(args.set))
    return with_rivals(merged, args.rival, args.together)


def _argument(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """`parse` for argparse, which tells only errors of its own kind in full."""

    @wraps(parse)
    def parse_argument(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return parse_argument
