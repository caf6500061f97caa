"""Top-1 accuracy of a vision transformer with fewer tokens, as in Figure 4 and Table 1 of the ATC paper (ECCV 2024).

Evaluates the unreduced model and every method at every fraction kept, off the shelf, and writes tables, a plot and
images of the clusters. Rerun the command to resume; `accelerate launch eval/classify.py ...` divides the images between
GPUs. `--demo` trains a small model on emoji instead, offline and without a GPU.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from atc_diffusion.commands import check_folder, check_number, one_sentence

with one_sentence("classify.py", extra="eval,vision"):
    import timm
    import torch
    from accelerate import PartialState
    from torchvision.datasets import ImageFolder
    from transformers.hf_argparser import HfArg

    from atc_eval.classification.accuracy import write_report
    from atc_eval.classification.demo import DemoTask
    from atc_eval.classification.evaluation import RESULTS, Reductions, Task, evaluate
    from atc_eval.command_line import check_exists, counted, parse
    from atc_eval.draw.sets import claim_folder, this_command

NUM_SHOWN = 3


@dataclass(frozen=True)
class ImageNetTask:
    """A model of timm's on ImageNet."""

    _argument_group_name = "ImageNet"
    imagenet_val: Path | None = HfArg(default=None, help="validation images, in one folder for each class")
    model: str = HfArg(default="deit_small_patch16_224", help="a VisionTransformer of timm's")
    weights: Path | None = HfArg(default=None, help="weights of the model (default: downloaded)")

    def __post_init__(self) -> None:
        check_exists("--imagenet-val", self.imagenet_val, "folder")
        check_exists("--weights", self.weights, "file")

    def make(self, out: Path) -> Task:
        if self.imagenet_val is None:
            raise ValueError(
                "--imagenet-val DIR is needed: ILSVRC2012's 50 000 validation images, in one folder for each of the"
                " 1000 classes; or use --demo"
            )
        model = load_model(self.model, self.weights)
        data = timm.data.resolve_model_data_config(model)
        folder = ImageFolder(str(self.imagenet_val), timm.data.create_transform(**data))
        if len(folder.classes) != model.num_classes:
            found = f"{self.imagenet_val} has {counted(len(folder.classes), 'folder')}"
            raise ValueError(f"{found}, but {self.model} has {model.num_classes} classes")
        mean, deviation = torch.tensor(data["mean"]), torch.tensor(data["std"])
        task = Task(
            name=f"{self.model}, {counted(len(folder), 'ImageNet validation image')}",
            model=model,
            images=folder,
            subjects=torch.arange(len(folder)).numpy(),
            shown=list(range(0, len(folder), -(-len(folder) // NUM_SHOWN))),
            visible=lambda image: (image.permute(1, 2, 0) * deviation + mean).clamp(0, 1).numpy(),
        )
        claim_folder(out, {"task": task.name, "weights": str(self.weights)}, RESULTS)
        return task


def load_model(name: str, weights: Path | None) -> torch.nn.Module:
    if not timm.is_model(name):
        raise ValueError(f"--model {name} is not one of timm's; see timm.list_models('*vit*')")
    try:
        return timm.create_model(name, pretrained=weights is None, checkpoint_path=str(weights or "")).eval()
    except Exception as error:  # the errors of the hub and of damaged files are of many kinds
        kind = type(error).__name__
        if weights:
            raise ValueError(
                f"--weights {weights} holds no weights of {name} ({kind}); give the model.safetensors of timm/{name}"
            ) from error
        raise ValueError(
            f"no weights for {name} ({kind}); download timm/{name} from the Hugging Face hub elsewhere and give its "
            "model.safetensors by --weights"
        ) from error


@dataclass(frozen=True)
class Classification:
    """What is done, and where results go."""

    demo: bool = HfArg(default=False, help="a small model trained on emoji, instead of ImageNet")
    batch_size: int = HfArg(default=64, help="images at a time")
    device: Literal["auto", "cpu"] = HfArg(default="auto", help="auto: the fastest there is")
    out: Path = HfArg(default=Path("out/classify"), help="folder for results")
    report: Path | None = HfArg(default=None, help="folder for the report (default: the same)")

    def __post_init__(self) -> None:
        check_number("--batch-size", self.batch_size)
        check_folder("--out", self.out)
        check_folder("--report", self.report)


KINDS = (ImageNetTask, DemoTask, Reductions, Classification)


def main(arguments: Sequence[str] | None = None) -> None:
    imagenet, emoji, reductions, wanted = parse(KINDS, __doc__, arguments)
    with one_sentence("classify.py", extra="eval,vision", stopped="rerun the command to resume"):
        task, folder = (emoji if wanted.demo else imagenet).make(wanted.out), wanted.report or wanted.out
        state = PartialState(cpu=wanted.device == "cpu")
        methods = reductions.methods()
        evaluations = [evaluate(task, method, wanted.out, wanted.batch_size, state) for method in methods]
        if state.is_main_process:
            write_report(evaluations, task, this_command(), str(state.device), folder)
            print(f"wrote {folder / 'report.md'}")


if __name__ == "__main__":
    main()
