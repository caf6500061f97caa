"""The exit of every command: a result, or one sentence and a status."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def door(command: str, extra: str, stopped: str = "rerun the command to resume") -> Iterator[None]:
    """Exit with one sentence if `command`, which needs an `extra` of the package, fails or is stopped."""
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
