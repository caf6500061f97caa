"""Command lines from dataclasses, whose `__post_init__` checks the values."""

from argparse import Action, RawDescriptionHelpFormatter
from collections.abc import Sequence
from typing import Any

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
        return parser.parse_args_into_dataclasses(arguments, look_for_args_file=False)
    except (ValueError, OSError) as error:
        return parser.error(str(error))
