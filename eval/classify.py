"""Top-1 accuracy of a vision transformer with fewer tokens, as in Figure 4 and Table 1 of the ATC paper (ECCV 2024).

Evaluates the unreduced model and every method at every fraction kept, off the shelf, and writes tables, a plot and
images of the clusters. Rerun the command to resume; `accelerate launch eval/classify.py ...` divides the images between
GPUs. `--demo` trains a small model on emoji instead, offline and without a GPU; `--finetune` trains it further with
tokens merged.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from atc_diffusion.commands import one_sentence

with one_sentence("classify.py", extra="eval,vision"):
    from transformers.hf_argparser import HfArg

    from atc_eval.checks import check_new_folder, check_number
    from atc_eval.classification.accuracy import evaluate_and_report
    from atc_eval.classification.reductions import Reductions
    from atc_eval.classification.tasks import DemoTask, ImageNetTask
    from atc_eval.command_line import parse


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
        check_new_folder("--out", self.out)
        check_new_folder("--report", self.report)


KINDS = (ImageNetTask, DemoTask, Reductions, Classification)


def main(arguments: Sequence[str] | None = None) -> None:
    imagenet, emoji, reductions, wanted = parse(KINDS, __doc__, arguments)
    with one_sentence("classify.py", extra="eval,vision", stopped="rerun the command to resume"):
        if reductions.finetune and not wanted.demo:
            raise ValueError("--finetune is for --demo; fine-tune an ImageNet model elsewhere and give it by --weights")
        task, folder = (emoji if wanted.demo else imagenet).make(wanted.out), wanted.report or wanted.out
        evaluate_and_report(task, reductions.trials(), wanted.out, folder, wanted.batch_size, wanted.device)


if __name__ == "__main__":
    main()
