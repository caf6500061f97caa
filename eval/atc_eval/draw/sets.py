"""The sets of images in an experiment's folder, whose images are whole and stamped, and the commands that made them."""

import json
import shlex
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from atc_diffusion.commands import write_atomically
from atc_eval.draw.images import PlannedImage
from atc_eval.files import load_image, read_json, write_json
from atc_eval.method import Method

COMMANDS = "commands.txt"
DRAWN = "sets/*/*.png"
STAMP = "atc_diffusion"  # the PNG text field of the stamp
ADDED: Mapping[str, Any] = {"lora": None, "scheduler": None}  # settings that older stamps lack, and what they were


@dataclass(frozen=True, eq=False)
class ImageSet:
    """The images of one method, in a folder.

    An image is written whole or not at all. Only a whole file with the right stamp counts; other files are ignored.
    """

    folder: Path  # made at the first `save`
    images: Sequence[PlannedImage]
    origin: dict[str, Any]  # what made the set (model, steps, method, ...); part of every stamp

    def path(self, image: PlannedImage) -> Path:
        return self.folder / image.file

    @property
    def paths(self) -> list[Path]:
        return [self.path(image) for image in self.images]

    def missing(self) -> list[PlannedImage]:
        """The images that are not there, or damaged; a whole one with another stamp must not be overwritten."""
        return [image for image in self.images if not self._holds(image)]

    def save(self, image: PlannedImage, drawn: Image.Image) -> None:
        stamp = PngInfo()
        stamp.add_text(STAMP, json.dumps(self._stamp(image), sort_keys=True))
        file = BytesIO()
        drawn.save(file, "png", pnginfo=stamp)
        write_atomically(self.path(image), file.getvalue())

    def load(self, image: PlannedImage) -> Image.Image:
        return load_image(self.path(image))

    def _stamp(self, image: PlannedImage) -> dict[str, Any]:
        return self.origin | {"prompt": image.prompt, "seed": image.seed}

    def _holds(self, image: PlannedImage) -> bool:
        stamp = read_stamp(path := self.path(image))
        if stamp is not None and (difference := differences(stamp, self._stamp(image))):
            raise ValueError(f"{path} was drawn with other settings ({difference}); give another --out, or move it")
        return stamp is not None


def read_stamp(path: Path) -> dict[str, Any] | None:
    """The stamp of a PNG, as this version writes it; empty if it has none, None if the file is missing or damaged."""
    try:
        with Image.open(path) as image:
            image.verify()  # the checksums of all chunks, without decoding
            stamp = json.loads(image.info.get(STAMP, "{}"))
    except (OSError, SyntaxError):
        return None
    return {**ADDED, **stamp, "way": Method.from_json(stamp["way"]).json} if "way" in stamp else stamp


def check_folder_settings(folder: Path, settings: Mapping[str, Any], results: str) -> None:
    """Checks that `folder` has no `results`, a pattern of files, that were made with other settings."""
    path = folder / "settings.json"
    if path.exists() and any(folder.glob(results)) and (changed := differences(ADDED | read_json(path), settings)):
        raise ValueError(f"{folder} was begun with other settings ({changed}); give another --out")


def claim_folder(folder: Path, settings: Mapping[str, Any], results: str) -> None:
    """Note in `folder` the settings of all `results` in it, unless others are there."""
    check_folder_settings(folder, settings, results)
    write_json(folder / "settings.json", dict(settings))


def differences(there: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """The settings in which two JSON objects differ, in words; empty if they are equal."""
    wanted = json.loads(json.dumps(wanted))  # lists for tuples
    there = json.loads(json.dumps(there))
    changed = [name for name in {**wanted, **there} if there.get(name) != wanted.get(name)]
    return "; ".join(f"{name}: {there.get(name)!r}, now {wanted.get(name)!r}" for name in changed)


Sets = dict[Method, ImageSet]


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
    found = {}
    for path in out.glob(f"sets/*/{images[0].file}"):
        try:
            stamp = read_stamp(path)
        except ValueError as error:  # this version has no such method
            warnings.warn(f"{path.parent} is left out: {error}", stacklevel=2)
            continue
        if stamp and "way" in stamp:
            found[Method.from_json(stamp["way"])] = path.parent
    return found


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
