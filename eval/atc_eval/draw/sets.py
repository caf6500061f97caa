"""The sets of images in an experiment's folder, and the commands that made them."""

import shlex
import sys
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from atc_eval.draw.image_set import ImageSet, read_stamp
from atc_eval.draw.images import PlannedImage
from atc_eval.files import write_atomically
from atc_eval.method import Method

Sets = dict[Method, ImageSet]
COMMANDS = "commands.txt"
DRAWN = "sets/*/*.png"


def make_sets(out: Path, methods: Iterable[Method], images: Sequence[PlannedImage], settings: dict[str, Any]) -> Sets:
    """A set of `images` in the folder `out` for each method, whether drawn or not."""
    there = _folders(out, images)
    return {
        each: ImageSet(there.get(each, out / "sets" / each.folder), images, settings | {"way": each.json})
        for each in methods
    }


def complete_sets(out: Path, images: Sequence[PlannedImage], settings: dict[str, Any]) -> Sets:
    """All sets in `out` that have all `images`, including those of earlier commands; the unmerged one first."""
    sets = make_sets(out, sorted(_folders(out, images), key=_place), images, settings)
    return {each: image_set for each, image_set in sets.items() if not image_set.missing()}


def _folders(out: Path, images: Sequence[PlannedImage]) -> dict[Method, Path]:
    """The folder of each method in `out`, whatever the version that named it."""
    found = {path.parent: _method(path) for path in out.glob(f"sets/*/{images[0].file}")}
    return {method: folder for folder, method in found.items() if method}


def _method(path: Path) -> Method | None:
    """The method that drew the image at `path`; None if it is damaged, or if this version has no such method."""
    try:
        stamp = read_stamp(path)
    except ValueError as error:
        warnings.warn(f"{path.parent} is left out: {error}", stacklevel=2)
        return None
    return Method.from_json(stamp["way"]) if stamp and "way" in stamp else None


def _place(method: Method) -> tuple[object, ...]:
    """The order in tables: unmerged, rivals, other merging, ATC; within each from the largest fraction kept down."""
    kept = [getattr(method.config, name, None) or 1.0 for name in ("r", "r_keys")]
    strength = method.rival.strength if method.rival else 0.0
    kind = type(method.config).__name__ == "ATCConfig", method.config is not None
    return not method.is_unmerged, *kind, method.label, [-each for each in kept], -strength


def note_command(out: Path) -> list[str]:
    """Add this command line to those that made the folder; returns all of them."""
    file = out / COMMANDS
    before = file.read_text().splitlines() if file.exists() else []
    commands = list(dict.fromkeys([*before, this_command()]))
    write_atomically(file, "\n".join(commands).encode())
    return commands


def this_command() -> str:
    return shlex.join(["python", *sys.argv])
