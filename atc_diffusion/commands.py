"""What the commands of this project share: help, checks of options, whole files, and how they end."""

import os
import sys
from argparse import Action, RawDescriptionHelpFormatter
from collections.abc import Iterator
from contextlib import contextmanager
from math import isfinite
from pathlib import Path
from typing import Any

SEEDS = range(-(2**63), 2**64)  # that torch.Generator takes


class Help(RawDescriptionHelpFormatter):
    """Keeps the lines of the description, and adds defaults where there are any."""

    def _get_help_string(self, action: Action) -> str:
        text, default = action.help or "", action.default
        if "(default" in text or default in (None, False, [], "==SUPPRESS=="):
            return text
        return f"{text} (default: {' '.join(map(str, default)) if isinstance(default, list) else '%(default)s'})"


class Several(Action):
    """For an option of one value or more; given again, it gets more of them."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options | {"nargs": "+"})

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        before = getattr(namespace, self.dest)
        setattr(namespace, self.dest, values if before is self.default else [*before, *values])


def number_problem(
    name: str, value: float | None, least: int = 1, most: int | None = None, multiple: int = 1
) -> str | None:
    """What `value` must be; None if it is a multiple of `multiple` in these limits."""
    if value is not None and least <= value <= (value if most is None else most) and value % multiple == 0:
        return None
    kind = f"a multiple of {multiple}" if multiple > 1 else "a whole number"
    return f"{name} must be {kind} from {least} {'up' if most is None else f'to {most}'}"


def check_number(option: str, value: int | None, least: int = 1, most: int | None = None, multiple: int = 1) -> None:
    """Raises ValueError for a value that was given and does not fit, as do the other checks."""
    if value is not None and (problem := number_problem(option, value, least, most, multiple)):
        raise ValueError(f"{problem}, got {value}")


def check_finite(option: str, value: float | None) -> None:
    if value is not None and not isfinite(value):
        raise ValueError(f"{option} must be a finite number, got {value}")


def check_folder(option: str, path: Path | None) -> None:
    """Checks that a folder can be written, and made if it is not there."""
    if path is not None:
        if path.exists() and not path.is_dir():
            raise ValueError(f"{option} {path} is a file; give a folder")
        _check_writable(option, path)


def check_file(option: str, path: Path | None, *suffixes: str) -> None:
    """Checks that a file, with one of the `suffixes` if there are any, can be written, and its folder made."""
    if path is not None:
        if path.is_dir():
            example = path / f"result{suffixes[0] if suffixes else ''}"
            raise ValueError(f"{option} {path} is a folder; give a file, such as {example}")
        if suffixes and path.suffix.lower() not in suffixes:
            raise ValueError(f"{option} {path} must end in {' or '.join(suffixes)}")
        _check_writable(option, path)


def _check_writable(option: str, path: Path) -> None:
    nearest = next(each for each in (path.absolute(), *path.absolute().parents) if each.exists())
    if not nearest.is_dir() and nearest != path.absolute():
        raise ValueError(f"{option} {path} cannot be made, because {nearest} is a file")
    if not os.access(nearest, os.W_OK):
        raise ValueError(f"{option} {path} cannot be written: no permission for {nearest}")


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` so that `path` holds all of it or stays as it was, even if the process is killed."""
    path.parent.mkdir(parents=True, exist_ok=True)
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


@contextmanager
def one_sentence(command: str, extra: str = "", stopped: str = "") -> Iterator[None]:
    """Exit with one sentence if `command` fails or is interrupted in the `with` block.

    Args:
        command: its name, with which the sentence begins.
        extra: the extra of this package that installs what the command needs.
        stopped: what to tell whoever interrupts it.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        needed = f"{command} needs the package {package}, which is not installed"
        sys.exit(f"{needed}; in the repository's folder: pip install -e '.[{extra}]'")
    except (ValueError, OSError) as error:
        sys.exit(f"{command}: {error}")
    except KeyboardInterrupt:
        sys.exit("; ".join(filter(None, [f"{command}: stopped", stopped])))
