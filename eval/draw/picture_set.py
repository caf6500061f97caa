"""The folder of pictures that one configuration makes: every picture whole, and stamped with what it is."""

import json
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from draw.pictures import Picture
from files import read_json, write_atomically, write_json

STAMP = "atc_diffusion"  # the PNG text field that says what a picture is


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
        write_atomically(self.path(picture), file.getvalue())

    def load(self, picture: Picture) -> Image.Image:
        with Image.open(self.path(picture)) as image:
            return image.convert("RGB")

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
    """What the PNG at `path` says it is ("{}" if nothing); None if there is no file or it is not whole."""
    try:
        with Image.open(path) as image:
            image.verify()  # the checksums of all chunks, without decoding
            return str(image.info.get(STAMP, "{}"))
    except (OSError, SyntaxError):
        return None


def claim_folder(folder: Path, settings: Mapping[str, Any], write: bool) -> None:
    """Make `folder` the place of runs with these `settings`, or check that it is.

    Raises:
        ValueError: if it holds pictures of a run with other settings, with the difference shown.
        OSError: if it cannot be written.
    """
    path = folder / "settings.json"
    if path.exists() and (difference := _difference(read_json(path), settings)):
        raise ValueError(f"{folder} holds pictures made with other settings ({difference}); give another --out")
    if write:
        write_json(path, dict(settings))


def _difference(there: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """The fields in which two JSON objects differ, as one phrase; empty where they are equal."""
    fields = [field for field in {**wanted, **there} if there.get(field) != wanted.get(field)]
    return "; ".join(f"{field}: {there.get(field)!r} there, {wanted.get(field)!r} now" for field in fields)
