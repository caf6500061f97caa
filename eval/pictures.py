"""The pictures of the experiment: what each one is, and the folder that holds a set of them."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

STAMP = "atc_diffusion"  # the PNG text field that says what a picture is


@dataclass(frozen=True)
class Picture:
    """One picture of the experiment: a prompt and a seed, both functions of class and image index."""

    class_index: int
    image_index: int
    prompt: str
    seed: int

    @property
    def file(self) -> str:
        return f"{self.class_index:04d}_{self.image_index}.png"


def plan(names: Sequence[str], classes: Sequence[int], per_class: int, template: str, seed: int) -> list[Picture]:
    """The pictures to generate, with prompts and seeds as in the authors' code.

    Args:
        names: names of all classes; line `i` of the file is class `i`.
        classes: indices of the classes to picture.
        per_class: pictures of each class.
        template: prompt with `{}` for the class name.
        seed: added to every picture's own seed, the number that class and image index make written side by side.
    """
    return [
        Picture(index, image, template.replace("{}", names[index]), seed + int(f"{index}{image}"))
        for index in classes
        for image in range(per_class)
    ]


def select_classes(text: str, count: int) -> list[int]:
    """Class indices that `text` asks for: "all", a number ("10": the first ten) or a list ("3,7" or "3,").

    Raises:
        ValueError: if `text` is none of these, or asks for a class that is not there.
    """
    if text == "all":
        return list(range(count))
    try:
        numbers = [int(number) for number in text.split(",") if number]
    except ValueError:
        raise ValueError(f"--classes is 'all', a count such as 10, or a list such as 3,7,12, got {text!r}") from None
    classes = numbers if "," in text else list(range(sum(numbers)))
    if not classes or len(set(classes)) < len(classes) or min(classes) < 0 or max(classes) >= count:
        raise ValueError(f"--classes {text!r} does not name different classes of 0..{count - 1}")
    return classes


class PictureSet:
    """The pictures that one configuration makes, in a folder.

    A picture is written whole or not at all, and carries a stamp that says what it is; only a file that is whole and
    has the right stamp counts. Other files in the folder are ignored.

    Args:
        folder: where the pictures are; made at the first `save`.
        pictures: what belongs to the set.
        origin: what made the set (model, steps, how tokens are merged, ...); part of every stamp.
    """

    def __init__(self, folder: Path, pictures: Sequence[Picture], origin: dict[str, Any]) -> None:
        self.folder = folder
        self.pictures = list(pictures)
        self.origin = origin

    def path(self, picture: Picture) -> Path:
        return self.folder / picture.file

    @property
    def paths(self) -> list[Path]:
        return [self.path(picture) for picture in self.pictures]

    def missing(self) -> list[Picture]:
        """Pictures still to be made: not there, or damaged.

        Raises:
            ValueError: if a file of that name is whole but something else, which must not be overwritten.
        """
        return [picture for picture in self.pictures if not self._holds(picture)]

    def save(self, picture: Picture, image: Image.Image) -> None:
        """Write a generated `image`, stamped."""
        stamp = PngInfo()
        stamp.add_text(STAMP, self._stamp(picture))
        file = BytesIO()
        image.save(file, "png", pnginfo=stamp)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path(picture), file.getvalue())

    def load(self, picture: Picture) -> Image.Image:
        with Image.open(self.path(picture)) as image:
            return image.convert("RGB")

    def _stamp(self, picture: Picture) -> str:
        return json.dumps(self.origin | {"prompt": picture.prompt, "seed": picture.seed}, sort_keys=True)

    def _holds(self, picture: Picture) -> bool:
        stamp = read_stamp(self.path(picture))
        if stamp is None or stamp == self._stamp(picture):
            return stamp is not None
        raise ValueError(
            f"{self.path(picture)} was not made with these settings ({_difference(stamp, self._stamp(picture))}); "
            "give another --out, or move it away"
        )


def read_stamp(path: Path) -> str | None:
    """What the PNG at `path` says it is ("{}" if nothing); None if there is no file or it is not whole."""
    try:
        with Image.open(path) as image:
            image.verify()  # the checksums of all chunks, without decoding
            return str(image.info.get(STAMP, "{}"))
    except (OSError, SyntaxError):
        return None


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` so that `path` holds all of it or is as it was, whenever the process is killed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:  # a full disk does not say where
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def claim_folder(folder: Path, settings: dict[str, Any], write: bool) -> None:
    """Make `folder` the place of runs with these `settings`, or check that it is.

    Raises:
        ValueError: if it holds pictures of a run with other settings, with the difference shown.
        OSError: if it cannot be written.
    """
    path = folder / "settings.json"
    text = json.dumps(settings, indent=2)
    if path.exists() and path.read_text() != text:
        difference = _difference(path.read_text(), text)
        raise ValueError(f"{folder} holds pictures made with other settings ({difference}); give another --out")
    if write:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text.encode())


def _difference(there: str, wanted: str) -> str:
    """The fields in which two JSON objects differ, as one phrase."""
    old, new = json.loads(there), json.loads(wanted)
    fields = [field for field in {**new, **old} if old.get(field) != new.get(field)]
    return "; ".join(f"{field}: {old.get(field)!r} there, {new.get(field)!r} now" for field in fields)
