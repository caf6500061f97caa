"""Gather the paper's reference images: the first five ImageNet validation images of each class, by name.

    python eval/reference.py --imagenet-val ILSVRC2012_img_val \\
        --ground-truth ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt --out reference

The official download has all 50 000 images in one folder; the file with their classes is in the development kit. With
one folder for each class, leave out --ground-truth. The 5000 images are copied unchanged.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from atc_diffusion.commands import one_sentence

with one_sentence("reference.py", extra="eval"):
    from transformers.hf_argparser import HfArg

    from atc_eval.checks import check_file, check_folder, check_new_folder
    from atc_eval.command_line import parse
    from atc_eval.files import list_images
    from atc_eval.score.reference_images import gather, shortened


@dataclass(frozen=True)
class Gathering:
    """The options of the command line."""

    imagenet_val: Path = HfArg(help="folder of the validation images")
    out: Path = HfArg(help="new folder for the 5000 images")
    ground_truth: Path | None = HfArg(
        default=None, help="file with the class of each image, one per line, for images in one folder"
    )

    def __post_init__(self) -> None:
        check_folder("--imagenet-val", self.imagenet_val)
        check_new_folder("--out", self.out)
        check_file("--ground-truth", self.ground_truth)


def main(arguments: Sequence[str] | None = None) -> None:
    [wanted] = parse([Gathering], __doc__, arguments)
    with one_sentence("reference.py"):
        converted = gather(wanted.imagenet_val, wanted.ground_truth, wanted.out)
    count, names = len(list_images(wanted.out)), shortened(converted)
    print(f"{count} images in {wanted.out}; not RGB, converted when read: {names}")


if __name__ == "__main__":
    main()
