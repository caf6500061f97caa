"""Top-1 accuracy of a vision transformer with fewer tokens, as in Figure 4 and Table 1 of the ATC paper (ECCV 2024).

Evaluates the unreduced model and every method at every share kept, off the shelf, and writes tables, a plot and
pictures of the clusters. Rerun the command to resume; `accelerate launch eval/classify.py ...` divides the pictures
between GPUs. `--demo` trains a small model on emoji instead, offline and without a GPU; `--finetune` trains it further
with tokens merged.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from arguments import checks
from arguments.door import door
from arguments.options import option, parse, switch

with door("classify.py", extra="eval,vision"):
    from classification.methods import Reductions
    from classification.report import evaluate_and_report
    from classification.tasks import DemoTask, ImageNetTask


@dataclass(frozen=True)
class Classification:
    """The options of the command line."""

    imagenet: ImageNetTask
    emoji: DemoTask
    reductions: Reductions
    demo: bool = switch("a small model trained on emoji, instead of ImageNet")
    batch_size: int = option("pictures at a time", 64, checks.whole(1))
    device: str = option("auto: the fastest there is", "auto", choices=["auto", "cpu"])
    out: Path = option("folder for results", Path("out/classify"), checks.folder_to_write)
    report: Path | None = option("folder for the report (default: the same)", None, checks.folder_to_write)

    def __post_init__(self) -> None:
        if self.reductions.finetune and not self.demo:
            raise ValueError("--finetune is for --demo; fine-tune an ImageNet model elsewhere and give it by --weights")


def main(arguments: Sequence[str] | None = None) -> None:
    wanted = parse(Classification, __doc__, arguments)
    with door("classify.py", extra="eval,vision"):
        task = (wanted.emoji if wanted.demo else wanted.imagenet).make(wanted.out)
        ways, folder = wanted.reductions.ways(), wanted.report or wanted.out
        evaluate_and_report(task, ways, wanted.out, folder, wanted.batch_size, wanted.device)


if __name__ == "__main__":
    main()
