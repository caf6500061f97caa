"""Command lines from dataclasses, whose `__post_init__` checks the values.

What does not fit raises ValueError, here and in all of `atc_eval`, and the command ends with its sentence. `option` is
how that names an option.
"""

import os
from argparse import Action, RawDescriptionHelpFormatter
from collections.abc import Sequence
from dataclasses import Field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from transformers import HfArgumentParser


class Help(RawDescriptionHelpFormatter):
    """Keeps the lines of the description, and adds defaults where there are any."""

    def _get_help_string(self, action: Action) -> str:
        text = action.help or ""
        says_enough = "(default" in text or action.default in (None, False, [], "==SUPPRESS==")
        return text if says_enough else f"{text} (default: %(default)s)"


def parse(
    kinds: Sequence[type], description: str | None, arguments: Sequence[str] | None = None, **defaults: Any
) -> tuple[Any, ...]:
    """Fill the dataclasses `kinds` from the command line; `defaults` replaces the fields' own, by name.

    Exits with status 2 and one sentence if a value does not fit.
    """
    parser = HfArgumentParser(kinds, description=description, formatter_class=Help, allow_abbrev=False)
    parser.set_defaults(**defaults)
    try:
        *filled, unknown = parser.parse_args_into_dataclasses(arguments, True, look_for_args_file=False)
        check_unknown(unknown, kinds)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return tuple(filled)


def check_unknown(arguments: Sequence[str], kinds: Sequence[type]) -> None:
    """Refuses arguments that no field of `kinds` takes, and names the option that was probably meant."""
    if arguments:
        known = [name for kind in kinds for field in fields(kind) for name in option_names(field)]
        meant = get_close_matches(arguments[0].partition("=")[0].strip("-"), known, n=1)
        hint = f"; did you mean --{meant[0]}?" if meant else ""
        raise ValueError(f"unrecognized arguments: {' '.join(arguments)}{hint}")


def option_names(field: Field[Any]) -> list[str]:
    """How the option of a field is called, without dashes in front."""
    return [name.strip("-").replace("_", "-") for name in (field.name, *field.metadata.get("aliases", []))]


def counted(number: int, noun: str) -> str:
    """A number with its noun, such as "1 image" or "2 images"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def check_number(option: str, value: int | None, least: int = 1, multiple: int = 1) -> None:
    if value is not None and (value < least or value % multiple):
        kind = "a whole number" if multiple == 1 else f"a multiple of {multiple}"
        raise ValueError(f"{option} must be {kind} from {least} up, got {value}")


def parse_fraction(text: str, option: str = "--keep", example: str = "50") -> float:
    """The fraction of tokens kept that a percentage stands for."""
    try:
        percent = float(text)
    except ValueError:
        raise ValueError(f"{option}: expected percentages of tokens kept, such as {example}, got {text!r}") from None
    if not 1 <= percent <= 100:
        hint = f"; did you mean {100 * percent:g}?" if 0 < percent < 1 else ""
        raise ValueError(f"{option}: expected percentages of tokens kept, from 1 to 100, got {percent:g}{hint}")
    return percent / 100


def check_exists(option: str, path: Path | None, kind: Literal["file", "folder"]) -> None:
    """Checks that the file or folder is there and can be read."""
    if path is not None:
        if not path.exists():
            raise ValueError(f"there is no {kind} {path}")
        if path.is_dir() != (kind == "folder"):
            raise ValueError(f"{option} {path} is a {'file' if path.is_file() else 'folder'}; give a {kind}")
        os.listdir(path) if kind == "folder" else path.open("rb").close()


def check_new(option: str, path: Path | None, *suffixes: str) -> None:
    """Checks that a folder, or a file with one of the `suffixes`, can be written."""
    if path is not None:
        if not suffixes and path.exists() and not path.is_dir():
            raise ValueError(f"{option} {path} is a file; give a folder")
        if suffixes and path.is_dir():
            raise ValueError(f"{option} {path} is a folder; give a file, such as {path / f'result{suffixes[0]}'}")
        if suffixes and path.suffix.lower() not in suffixes:
            raise ValueError(f"{option} {path} must end in {' or '.join(suffixes)}")
        nearest = next(each for each in (path.absolute(), *path.absolute().parents) if each.exists())
        if not nearest.is_dir() and nearest != path.absolute():
            raise ValueError(f"{option} {path} cannot be made, because {nearest} is a file")
        if not os.access(nearest, os.W_OK):
            raise ValueError(f"{option} {path} cannot be written: no permission for {nearest}")


def read_names(option: str, path: Path) -> list[str]:
    """The lines of a file of names, without a byte order mark."""
    check_exists(option, path, "file")
    try:
        names = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8 ({error})") from error
    empty = [number for number, name in enumerate(names, start=1) if not name.strip()]
    if empty or not names:
        where = f"line {empty[0]} of {path} is empty" if empty else f"{path} is empty"
        raise ValueError(f"{where}; write one name on each line")
    return names
