"""Gather the paper's reference images: the first five ImageNet validation images of each class, by name.

    python eval/reference.py --imagenet-val ILSVRC2012_img_val \\
        --ground-truth ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt --out reference

The official download has all 50 000 images in one folder; the file with their classes is in the development kit. With
one folder for each class, leave out --ground-truth. The 5000 images are copied unchanged.
"""

import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atc_diffusion.commands import check_folder, one_sentence

with one_sentence("reference.py", extra="eval"):
    from tqdm import tqdm
    from transformers.hf_argparser import HfArg

    from atc_eval.command_line import check_exists, counted, parse
    from atc_eval.files import image_mode, list_images

NUM_CLASSES = 1000
PER_CLASS = 5
Classes = Mapping[Any, Sequence[Path]]  # images by class, sorted by name
GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"


@dataclass(frozen=True)
class Gathering:
    """The options of the command line."""

    imagenet_val: Path = HfArg(help="folder of the validation images")
    out: Path = HfArg(help="new folder for the 5000 images")
    ground_truth: Path | None = HfArg(default=None, help="file with the class of each image, if all are in one folder")

    def __post_init__(self) -> None:
        check_exists("--imagenet-val", self.imagenet_val, "folder")
        check_folder("--out", self.out)
        check_exists("--ground-truth", self.ground_truth, "file")


def main(arguments: Sequence[str] | None = None) -> None:
    [wanted] = parse([Gathering], __doc__, arguments)
    with one_sentence("reference.py"):
        converted = gather(wanted.imagenet_val, wanted.ground_truth, wanted.out)
    count, names = len(list_images(wanted.out)), shortened(converted)
    print(f"{count} images in {wanted.out}; not RGB, converted when read: {names}")


def gather(source: Path, ground_truth: Path | None, out: Path) -> list[str]:
    """Copy the reference images to a new folder `out`, all or none; returns names and modes of those that are not RGB.

    Without `ground_truth`, `source` has a folder of images for each class.
    """
    if out.exists():
        raise ValueError(f"--out {out} already exists; give a new folder")
    classes = by_folder(source) if ground_truth is None else by_ground_truth(source, ground_truth)
    chosen = first_of_each(classes)
    with ThreadPoolExecutor() as threads:
        found = tqdm(threads.map(image_mode, chosen), total=len(chosen), unit="image")
        modes = dict(zip(chosen, found, strict=True))
    unreadable = [path.name for path, mode in modes.items() if mode is None]
    if unreadable:
        raise ValueError(f"unreadable images: {shortened(unreadable)}")
    partial = out.with_name(f".{out.name}.partial")  # the folder appears when it is complete
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for number, path in enumerate(chosen):
        shutil.copy(path, partial / f"{number:04d}_{path.name}")
    partial.rename(out)
    return [f"{path.name} ({mode})" for path, mode in modes.items() if mode != "RGB"]


def by_folder(source: Path) -> Classes:
    """Images of every class folder in `source`, sorted by name."""
    folders = [folder for folder in sorted(source.iterdir()) if folder.is_dir()]
    if not folders and (count := len(list_images(source))):
        raise ValueError(
            f"{source} holds {counted(count, 'image')} and no class folders; add --ground-truth {GROUND_TRUTH}, a file "
            "in the data folder of ImageNet's development kit (ILSVRC2012_devkit_t12)"
        )
    return {folder.name: list_images(folder) for folder in folders}


def by_ground_truth(source: Path, ground_truth: Path) -> Classes:
    """Images in `source` by class: line `i` of `ground_truth` is the class of the i-th image by name."""
    paths = list_images(source)
    try:
        labels = [int(line) for line in ground_truth.read_text(encoding="utf-8-sig").split()]
    except ValueError as error:  # of a number or, in a binary file, of a character
        raise ValueError(
            f"--ground-truth {ground_truth} must hold one class on each line, a number, like {GROUND_TRUTH}"
        ) from error
    if len(paths) != len(labels):
        there, wanted = counted(len(paths), "image"), counted(len(labels), "line")
        raise ValueError(f"{source} has {there}, but {ground_truth} has {wanted}")
    classes: dict[int, list[Path]] = {label: [] for label in sorted(labels)}
    for path, label in zip(paths, labels, strict=True):
        classes[label].append(path)
    return classes


def first_of_each(classes: Classes) -> list[Path]:
    """The first five images of each of the 1000 classes."""
    if len(classes) != NUM_CLASSES:
        raise ValueError(
            f"expected {NUM_CLASSES} classes, found {len(classes)}; give --imagenet-val a folder of {NUM_CLASSES} "
            f"class folders, or a folder of all images together with --ground-truth {GROUND_TRUTH}"
        )
    short = [f"{name} has {len(paths)}" for name, paths in classes.items() if len(paths) < PER_CLASS]
    if short:
        raise ValueError(f"every class needs at least {PER_CLASS} images, but {shortened(short)}")
    return [path for paths in classes.values() for path in paths[:PER_CLASS]]


def shortened(names: Sequence[str], count: int = 20) -> str:
    rest = f" and {len(names) - count} more" if len(names) > count else ""
    return (", ".join(names[:count]) or "none") + rest


if __name__ == "__main__":
    main()
