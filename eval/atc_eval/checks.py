"""Checks of options, before anything is drawn; `option` is how a message names it."""

import os
from pathlib import Path


def check_number(option: str, value: int | None, least: int = 1, multiple: int = 1) -> None:
    if value is not None and (value < least or value % multiple):
        kind = "a whole number" if multiple == 1 else f"a multiple of {multiple}"
        raise ValueError(f"{option} must be {kind} from {least} up, got {value}")


def parse_fraction(text: str) -> float:
    """The fraction of tokens kept that a percentage stands for."""
    try:
        percent = float(text)
    except ValueError:
        raise ValueError(f"expected percentages of tokens kept, such as 50 or 100/12.5, got {text!r}") from None
    if not 1 <= percent <= 100:
        hint = f"; did you mean {100 * percent:g}?" if 0 < percent < 1 else ""
        raise ValueError(f"expected percentages of tokens kept, from 1 to 100, got {percent:g}{hint}")
    return percent / 100


def check_folder(option: str, path: Path | None) -> None:
    """Checks that the folder exists and can be listed."""
    if path is not None:
        if not path.is_dir():
            raise ValueError(f"{option} {path} is a file; give a folder" if path.exists() else _missing("folder", path))
        os.listdir(path)


def check_file(option: str, path: Path | None) -> None:
    """Checks that the file can be read."""
    if path is not None:
        if not path.is_file():
            raise ValueError(f"{option} {path} is a folder; give a file" if path.exists() else _missing("file", path))
        path.open("rb").close()


def _missing(kind: str, path: Path) -> str:
    return f"there is no {kind} {path}"


def check_new_folder(option: str, path: Path | None) -> None:
    """Checks that the folder exists or can be made."""
    if path is not None:
        if path.exists() and not path.is_dir():
            raise ValueError(f"{option} {path} is a file; give a folder")
        _check_writable(option, path)


def check_new_file(option: str, path: Path | None, *suffixes: str) -> None:
    """Checks that the file can be written and has one of the `suffixes`."""
    if path is not None:
        if path.is_dir():
            raise ValueError(f"{option} {path} is a folder; give a file, such as {path / f'result{suffixes[0]}'}")
        if path.suffix.lower() not in suffixes:
            raise ValueError(f"{option} {path} must end in {' or '.join(suffixes)}")
        _check_writable(option, path)


def _check_writable(option: str, path: Path) -> None:
    """Checks that the nearest existing parent is a folder that can be written."""
    nearest = next(each for each in (path.absolute(), *path.absolute().parents) if each.exists())
    if not nearest.is_dir() and nearest != path.absolute():
        raise ValueError(f"{option} {path} cannot be made, because {nearest} is a file")
    if not os.access(nearest, os.W_OK):
        raise ValueError(f"{option} {path} cannot be written: no permission for {nearest}")


def read_names(option: str, path: Path) -> list[str]:
    """The lines of a file of names, without a byte order mark."""
    check_file(option, path)
    try:
        names = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8 ({error})") from error
    empty = [number for number, name in enumerate(names, start=1) if not name.strip()]
    if empty or not names:
        where = f"line {empty[0]} of {path} is empty" if empty else f"{path} is empty"
        raise ValueError(f"{where}; write one name on each line")
    return names
