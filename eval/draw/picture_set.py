"""The pictures of one configuration in a folder: each is whole, and stamped with its prompt, seed and settings."""

import json
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from draw.pictures import Picture
from files import load_picture, read_json, write_atomically, write_json

STAMP = "atc_diffusion"  # the PNG text field of the stamp


class PictureSet:
    """The pictures of one configuration, in a folder.

    A picture is written whole or not at all. Only a whole file with the right stamp counts; other files are ignored.

    Args:
        folder: the folder, made at the first `save`.
        pictures: the pictures of the set.
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
        """The pictures that are not there, or damaged.

        Raises:
            ValueError: if a picture's file is whole but has another stamp; it must not be overwritten.
        """
        return [picture for picture in self.pictures if not self._holds(picture)]

    def save(self, picture: Picture, image: Image.Image) -> None:
        stamp = PngInfo()
        stamp.add_text(STAMP, self._stamp(picture))
        file = BytesIO()
        image.save(file, "png", pnginfo=stamp)
        write_atomically(self.path(picture), file.getvalue())

    def load(self, picture: Picture) -> Image.Image:
        return load_picture(self.path(picture))

    def _stamp(self, picture: Picture) -> str:
        return json.dumps(self.origin | {"prompt": picture.prompt, "seed": picture.seed}, sort_keys=True)

    def _holds(self, picture: Picture) -> bool:
        stamp, wanted = read_stamp(self.path(picture)), self._stamp(picture)
        if stamp is None or stamp == wanted:
            return stamp is not None
        difference = _difference(json.loads(stamp), json.loads(wanted))
        raise ValueError(
            f"{self.path(picture)} was not made with these settings ({difference}); give another --out, or move it away"
        )


def read_stamp(path: Path) -> str | None:
    """The stamp of the PNG at `path` ("{}" if it has none); None if there is no file or it is damaged."""
    try:
        with Image.open(path) as image:
            image.verify()  # the checksums of all chunks, without decoding
            return str(image.info.get(STAMP, "{}"))
    except (OSError, SyntaxError):
        return None


def claim_folder(folder: Path, settings: Mapping[str, Any], write: bool) -> None:
    """Reserve `folder` for runs with these `settings`.

    Raises:
        ValueError: naming the difference, if it holds pictures of a run with other settings.
    """
    path = folder / "settings.json"
    if path.exists() and (difference := _difference(read_json(path), settings)):
        raise ValueError(f"{folder} holds pictures made with other settings ({difference}); give another --out")
    if write:
        write_json(path, dict(settings))


def _difference(there: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """The fields in which two JSON objects differ, in words; empty if they are equal."""
    fields = [field for field in {**wanted, **there} if there.get(field) != wanted.get(field)]
    return "; ".join(f"{field}: {there.get(field)!r} there, {wanted.get(field)!r} now" for field in fields)
