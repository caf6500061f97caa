"""Top-1 accuracy of a vision transformer with fewer tokens, as in Figure 4 and Table 1 of the ATC paper (ECCV 2024).

Evaluates the model as it is and with every method at every share kept, off the shelf, and writes tables, a plot and
pictures of the clusters. Rerun the command to resume; `accelerate launch eval/classify.py ...` divides the pictures
between GPUs. `--demo` trains a small model on emoji, and also trains it further with tokens merged: offline, no GPU.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import timm
import torch
from accelerate import PartialState
from classify_demo import demo_task
from classify_report import write_report
from classify_scores import Task, evaluate
from classify_ways import METHODS, Way, ways
from pictures import claim_folder
from torchvision.datasets import ImageFolder

from atc_diffusion.clustering import LINKAGES

DEIT = "deit_small_patch16_224"
NUM_SHOWN = 3


def main(arguments: Sequence[str] | None = None) -> None:
    args = make_parser().parse_args(arguments)
    try:
        run(args)
    except (ValueError, OSError) as error:
        sys.exit(f"classify.py: {error}")
    except KeyboardInterrupt:
        sys.exit("classify.py: stopped; rerun the command to resume")


def run(args: argparse.Namespace) -> None:
    """Evaluate what is missing, then report. Bad input is reported before anything is computed."""
    chosen = all_ways(args)
    state = PartialState(cpu=args.device == "cpu")
    task = make_task(args)
    evaluations = [evaluate(task, way, args.out, args.batch_size, state) for way in chosen]
    if state.is_main_process:
        folder = args.report or args.out
        write_report(evaluations, task, shlex.join(["python", *sys.argv]), str(state.device), folder)
        print(f"wrote {folder / 'report.md'}")


def all_ways(args: argparse.Namespace) -> list[Way]:
    """Off the shelf, then fine-tuned."""
    chosen = list(ways(args.method, args.linkage, args.keep, args.remove, args.schedule))
    if args.finetune and not args.demo:
        raise ValueError("--finetune is for --demo; fine-tune an ImageNet model elsewhere and give it by --weights")
    further = [way for way in chosen if way.keep in args.finetune]
    return [*chosen, *(replace(way, finetuned=True) for way in chosen[: bool(further)] + further)]


def make_task(args: argparse.Namespace) -> Task:
    if args.demo:
        claim_folder(args.out, {"demo": "emoji", "epochs": args.epochs}, write=True)
        return demo_task(args.emoji_pictures, args.out / "model.pt", args.epochs)
    task = imagenet_task(args.imagenet_val, args.model, args.weights)
    claim_folder(args.out, {"task": task.name, "weights": str(args.weights)}, write=True)
    return task


def imagenet_task(folder: Path | None, name: str, weights: Path | None) -> Task:
    """The validation pictures, in a folder for each class, and a model of timm's."""
    if folder is None or not folder.is_dir():
        raise ValueError(
            "--imagenet-val DIR is needed: ILSVRC2012's 50 000 validation pictures, in one folder for each of the 1000"
            " classes; or use --demo"
        )
    model = load_model(name, weights)
    data = timm.data.resolve_model_data_config(model)
    pictures = ImageFolder(str(folder), timm.data.create_transform(**data))
    if len(pictures.classes) != model.num_classes:
        raise ValueError(f"{folder} has {len(pictures.classes)} folders, but {name} tells {model.num_classes} classes")
    mean, deviation = torch.tensor(data["mean"]), torch.tensor(data["std"])
    return Task(
        name=f"{name}, {len(pictures)} ImageNet validation pictures",
        model=model,
        pictures=pictures,
        subjects=torch.arange(len(pictures)).numpy(),
        shown=list(range(0, len(pictures), -(-len(pictures) // NUM_SHOWN))),
        visible=lambda image: (image.permute(1, 2, 0) * deviation + mean).clamp(0, 1).numpy(),
    )


def load_model(name: str, weights: Path | None) -> torch.nn.Module:
    if not timm.is_model(name):
        raise ValueError(f"--model {name} is not one of timm's; see timm.list_models('*vit*')")
    try:
        return timm.create_model(name, pretrained=weights is None, checkpoint_path=str(weights or ""))
    except Exception as error:  # the hub's errors are of many kinds
        raise ValueError(
            f"no weights for {name} ({type(error).__name__}); fetch timm/{name} from the Hugging Face hub on a machine"
            " that reaches it and give its model.safetensors by --weights"
        ) from error


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--imagenet-val", type=Path, metavar="DIR", help="ImageNet's validation pictures, one folder for each class")
    add("--model", default=DEIT, help="a VisionTransformer of timm's (default: %(default)s)")
    add("--weights", type=Path, metavar="FILE", help="of the model (default: downloaded)")
    add("--demo", action="store_true", help="a small model trained on emoji, instead of ImageNet")
    add(
        "--emoji-pictures",
        type=Path,
        default=Path("out/emoji"),
        metavar="DIR",
        help="for --demo (default: %(default)s)",
    )
    add("--epochs", type=int, default=16, help="for --demo: of training (default: %(default)s)")
    add(
        "--finetune",
        type=float,
        nargs="*",
        default=[],
        metavar="PERCENT",
        help="for --demo: also trained further at these",
    )
    add("--method", nargs="+", choices=list(METHODS), default=list(METHODS), help="(default: all)")
    linkages = "of atc (default: average complete single)"
    add("--linkage", nargs="+", choices=LINKAGES, default=["average", "complete", "single"], help=linkages)
    keep = "percentages of the tokens kept at the 4th, 7th and 10th block (default: 25 50 70 90)"
    add("--keep", type=float, nargs="*", default=[25, 50, 70, 90], metavar="PERCENT", help=keep)
    remove = "tokens removed in every block, as in the paper's Table 1 (16 for ViT-B, 8 for ViT-L, 7 for ViT-H)"
    add("--remove", type=int, nargs="*", default=[], metavar="T", help=remove)
    add("--schedule", nargs="+", choices=["constant", "linear"], default=["constant", "linear"], help="of --remove")
    add("--batch-size", type=int, default=64, metavar="N", help="(default: %(default)s)")
    add("--device", choices=["auto", "cpu"], default="auto", help="(default: auto, the fastest there is)")
    add("--out", type=Path, default=Path("out/classify"), metavar="DIR", help="for results (default: %(default)s)")
    add("--report", type=Path, metavar="DIR", help="for the report (default: the same)")
    return parser


if __name__ == "__main__":
    main()
