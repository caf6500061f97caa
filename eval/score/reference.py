"""Gather the paper's reference pictures: the first five ImageNet validation pictures of each class, by name."""

import shutil
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from files import list_pictures, picture_mode

NUM_CLASSES = 1000
PER_CLASS = 5


def gather(source: Path, ground_truth: Path | None, out: Path) -> list[str]:
    """Copy the reference pictures from `source` to a new folder `out`.

    Args:
        source: folder with a folder of pictures for each class, or with all pictures.
        ground_truth: for the latter, a file whose line `i` is the class of the `i`-th picture by name.
        out: the new folder, written completely or not at all.

    Returns:
        Names and modes of the pictures that are not RGB.

    Raises:
        ValueError: naming the pictures that are missing or unreadable.
    """
    if out.exists():
        raise ValueError(f"--out {out} already exists; give a new folder")
    classes = by_folder(source) if ground_truth is None else by_ground_truth(source, ground_truth)
    chosen = first_of_each(classes)
    with ThreadPoolExecutor() as threads:
        found = tqdm(threads.map(picture_mode, chosen), total=len(chosen), unit="picture")
        modes = dict(zip(chosen, found, strict=True))
    unreadable = [path.name for path, mode in modes.items() if mode is None]
    if unreadable:
        raise ValueError(f"{len(unreadable)} pictures are unreadable: {shortened(unreadable)}")
    copy_all(chosen, out)
    return [f"{path.name} ({mode})" for path, mode in modes.items() if mode != "RGB"]


def by_folder(source: Path) -> dict[str, Sequence[Path]]:
    """Pictures of every class folder in `source`, sorted by name."""
    return {folder.name: list_pictures(folder) for folder in sorted(source.iterdir()) if folder.is_dir()}


def by_ground_truth(source: Path, ground_truth: Path) -> dict[str, Sequence[Path]]:
    """Pictures in `source` by class: line `i` of `ground_truth` is the class of the i-th picture by name."""
    paths, labels = list_pictures(source), ground_truth.read_text().split()
    if len(paths) != len(labels):
        raise ValueError(f"{source} has {len(paths)} pictures, but {ground_truth} has {len(labels)} lines")
    classes: dict[str, list[Path]] = {label: [] for label in sorted(labels, key=int)}
    for path, label in zip(paths, labels, strict=True):
        classes[label].append(path)
    return dict(classes)


def first_of_each(classes: dict[str, Sequence[Path]]) -> list[Path]:
    """The first five pictures of each of the 1000 classes."""
    if len(classes) != NUM_CLASSES:
        raise ValueError(
            f"found {len(classes)} classes instead of {NUM_CLASSES}; give --imagenet-val a folder of {NUM_CLASSES} "
            "class folders, or a folder of all pictures together with --ground-truth"
        )
    short = [f"{name} has {len(paths)}" for name, paths in classes.items() if len(paths) < PER_CLASS]
    if short:
        raise ValueError(f"{len(short)} classes have fewer than {PER_CLASS} pictures: {shortened(short)}")
    return [path for paths in classes.values() for path in paths[:PER_CLASS]]


def copy_all(paths: Iterable[Path], out: Path) -> None:
    """Copy `paths`, numbered, to the new folder `out`, which appears when it is complete."""
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for number, path in enumerate(paths):
        shutil.copy(path, partial / f"{number:04d}_{path.name}")
    partial.rename(out)


def shortened(names: Sequence[str], count: int = 20) -> str:
    rest = f" and {len(names) - count} more" if len(names) > count else ""
    return (", ".join(names[:count]) or "none") + rest
