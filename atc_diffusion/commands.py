"""What the commands of this project share: which seeds they take, and how they end, at worst with one sentence."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

SEEDS = range(-(2**63), 2**64)  # that torch.Generator takes


@contextmanager
def one_sentence(command: str, extra: str = "", stopped: str = "") -> Iterator[None]:
    """Exit with one sentence if `command` fails or is interrupted in the `with` block.

    Args:
        command: its name, with which the sentence begins.
        extra: the extra of this package that installs what the command needs.
        stopped: what to say to who interrupts it.
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
