"""Gather the paper's reference pictures: the first five ImageNet validation pictures of each class, by name.

The validation pictures may be in one folder for each class, or all in one folder; the latter needs the development
kit's ILSVRC2012_validation_ground_truth.txt. They are copied unchanged.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from arguments import checks
from arguments.door import door
from arguments.options import option, parse

with door("reference.py", extra="eval"):
    from files import list_pictures
    from score.reference import gather, shortened


@dataclass(frozen=True)
class Gathering:
    """The options of the command line."""

    imagenet_val: Path = option("folder of the validation pictures", parse=checks.folder)
    out: Path = option("new folder for the 5000 pictures", parse=checks.folder_to_write)
    ground_truth: Path | None = option("file with the class of each picture, one per line", None, checks.file)


def main(arguments: Sequence[str] | None = None) -> None:
    wanted = parse(Gathering, __doc__, arguments)
    with door("reference.py", extra="eval"):
        converted = gather(wanted.imagenet_val, wanted.ground_truth, wanted.out)
    count, names = len(list_pictures(wanted.out)), shortened(converted)
    print(f"{count} pictures in {wanted.out}; not RGB, converted when read: {names}")


if __name__ == "__main__":
    main()
