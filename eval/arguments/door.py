"""The way out of every command: a result, or one sentence and a status."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def door(command: str, extra: str, stopped: str = "rerun the command to resume") -> Iterator[None]:
    """Turns what can go wrong in `command` into one sentence.

    Args:
        command: name of the file.
        extra: the extra of the package that has what the command needs.
        stopped: what to say after Ctrl-C.
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
        sys.exit(f"{command}: stopped; {stopped}")
