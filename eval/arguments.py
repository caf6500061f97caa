"""The command line of the experiment."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from configurations import add_way_options
from features import LAYERS, RESIZERS
from rivals import Rival

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
