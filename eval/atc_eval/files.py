"""JSON files, and folders of images."""

import json
from pathlib import Path
from typing import Any

from PIL import Image

from atc_diffusion.commands import write_atomically

FEWEST_IMAGES = 4  # in a set to score: precision and recall look at three neighbours
IMAGE_SUFFIXES = (".jpeg", ".jpg", ".png", ".webp")


def write_json(path: Path, value: Any) -> None:
    write_atomically(path, json.dumps(value, indent=1).encode())


def read_json(path: Path) -> Any:
    """The value in a JSON file; if that is damaged, the error names it."""
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); delete it and rerun the command") from error


def list_images(folder: Path) -> tuple[Path, ...]:
    """Paths of the images in `folder`, sorted by name."""
    named = (path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES and path.name[0] != ".")
    return tuple(sorted(path for path in named if path.is_file()))


def load_image(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def image_mode(path: Path) -> str | None:
    """PIL's name for the kind of pixels at `path`; None if they cannot be read."""
    try:
        with Image.open(path) as image:
            image.load()
            return str(image.mode)
    except (OSError, SyntaxError):
        return None
