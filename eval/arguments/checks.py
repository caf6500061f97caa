"""Checks of arguments. Files and folders are opened here, before anything is drawn."""

import os
from collections.abc import Callable
from pathlib import Path

from files import list_pictures

FEWEST_PICTURES = 4  # in a set to score: precision and recall look at three neighbours


def whole(least: int, multiple: int = 1) -> Callable[[str], int]:
    """A whole number from `least` up."""
    expected = f"a whole number from {least} up" if multiple == 1 else f"a multiple of {multiple}, from {least} up"

    def parse_whole(text: str) -> int:
        if not text.isdecimal() or int(text) < least or int(text) % multiple:
            raise ValueError(f"expected {expected}, got {text!r}")
        return int(text)

    return parse_whole


def percent(text: str) -> float:
    """A percentage of tokens kept, from 1 to 100."""
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"expected percentages of tokens kept, such as 50, got {text!r}") from None
    if not 1 <= value <= 100:
        hint = f"; did you mean {100 * value:g}?" if 0 < value < 1 else ""
        raise ValueError(f"expected percentages of tokens kept, from 1 to 100, got {value:g}{hint}")
    return value


def folder(text: str) -> Path:
    """A folder that exists and can be listed."""
    path = Path(text)
    if not path.is_dir():
        raise ValueError(f"{text} is a file; give a folder" if path.exists() else f"there is no folder {text}")
    os.listdir(path)
    return path


def file(text: str) -> Path:
    """A file that can be read."""
    path = Path(text)
    if not path.is_file():
        raise ValueError(f"{text} is a folder; give a file" if path.exists() else f"there is no file {text}")
    with path.open("rb"):
        return path


def folder_to_write(text: str) -> Path:
    """A folder that exists or can be made."""
    path = Path(text)
    if path.exists() and not path.is_dir():
        raise ValueError(f"{text} is a file; give a folder")
    return _writable(path)


def file_to_write(*suffixes: str) -> Callable[[str], Path]:
    """A file that can be written and has one of the `suffixes`."""

    def parse_file(text: str) -> Path:
        path = Path(text)
        if path.is_dir():
            raise ValueError(f"{text} is a folder; give a file, such as {path / f'result{suffixes[0]}'}")
        if path.suffix.lower() not in suffixes:
            raise ValueError(f"{text} must end in {' or '.join(suffixes)}")
        return _writable(path)

    return parse_file


def _writable(path: Path) -> Path:
    """`path`, if its nearest existing parent is a folder that can be written."""
    nearest = next(each for each in (path.absolute(), *path.absolute().parents) if each.exists())
    if not nearest.is_dir() and nearest != path.absolute():
        raise ValueError(f"{path} cannot be made, because {nearest} is a file")
    if not os.access(nearest, os.W_OK):
        raise ValueError(f"{path} cannot be written: no permission for {nearest}")
    return path


def lines(text: str) -> tuple[str, ...]:
    """The lines of a file of names, without a byte order mark."""
    try:
        names = file(text).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{text} is not text in UTF-8 ({error})") from error
    empty = [number for number, name in enumerate(names, start=1) if not name.strip()]
    if empty or not names:
        where = f"line {empty[0]} of {text} is empty" if empty else f"{text} is empty"
        raise ValueError(f"{where}; write one name on each line")
    return tuple(names)


def template(text: str) -> str:
    """A prompt with `{}` in place of the class name."""
    if "{}" not in text:
        raise ValueError(f"expected a prompt with {{}} for the name of the class, got {text!r}")
    return text


def model(text: str) -> str:
    """A folder with a pipeline, or a hub id, which is looked up when the model is loaded."""
    return _on_the_hub(text, "pipeline", "model_index.json")


def lora(text: str) -> str:
    """A folder with a LoRA, or a hub id, which is looked up when the LoRA is loaded."""
    return _on_the_hub(text, "LoRA", "*.safetensors")


def _on_the_hub(text: str, kind: str, pattern: str) -> str:
    path = Path(text).expanduser()
    if path.is_dir() and not any(path.glob(pattern)):
        raise ValueError(f"the folder {text} holds no diffusers {kind}: it has no {pattern}")
    if not path.is_dir() and (text.count("/") != 1 or text[0] in "/.~"):
        raise ValueError(f"there is no folder {text}; give a folder with a {kind}, or a hub id (owner/name)")
    return str(path) if path.is_dir() else text


def pictures(text: str) -> tuple[Path, ...]:
    """The pictures in a folder, sorted by name, if they are enough to score."""
    paths = list_pictures(folder(text))
    if len(paths) < FEWEST_PICTURES:
        raise ValueError(f"{text} has {len(paths)} pictures; at least {FEWEST_PICTURES} are needed")
    return paths
