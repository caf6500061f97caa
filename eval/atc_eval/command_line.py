"""Command lines from dataclasses, whose `__post_init__` checks the values.

What does not fit raises ValueError, here and in all of `atc_eval`, and the command ends with its sentence. `option` is
how that names an option.
"""

import os
from collections.abc import Sequence
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from transformers import HfArgumentParser
from transformers.hf_argparser import HfArg

from atc_diffusion.commands import Help, Several


def several(
    default: Sequence[Any], help: str, choices: Sequence[str] | None = None, aliases: Sequence[str] = ()
) -> Any:
    """A field whose option takes several values."""
    metadata = {"choices": choices, "action": Several}
    return HfArg(default_factory=lambda: list(default), aliases=list(aliases), metadata=metadata, help=help)


def parse(
    kinds: Sequence[type],
    description: str | None,
    arguments: Sequence[str] | None = None,
    defaults: Sequence[str] = (),
) -> tuple[Any, ...]:
    """Fill the dataclasses `kinds` from the command line; exits with one sentence if a value does not fit.

    `defaults` are arguments that hold for options that are not given.
    """
    parser = HfArgumentParser(kinds, description=description, formatter_class=Help, allow_abbrev=False)
    if defaults:
        parser.set_defaults(**vars(parser.parse_args(defaults)))
    try:
        *filled, unknown = parser.parse_args_into_dataclasses(arguments, True, look_for_args_file=False)
        check_unknown(unknown, kinds)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return tuple(filled)


def check_unknown(arguments: Sequence[str], kinds: Sequence[type]) -> None:
    """Refuses arguments that no field of `kinds` takes, and names the option that was probably meant."""
    if arguments:
        options = [field for kind in kinds for field in fields(kind)]
        names = [name for field in options for name in (field.name, *field.metadata.get("aliases", []))]
        known = [name.strip("-").replace("_", "-") for name in names]
        meant = get_close_matches(arguments[0].partition("=")[0].strip("-"), known, n=1)
        hint = f"; did you mean --{meant[0]}?" if meant else ""
        raise ValueError(f"unrecognized arguments: {' '.join(arguments)}{hint}")


def counted(number: int, noun: str) -> str:
    """A number with its noun, such as "1 image" or "2 images"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


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
