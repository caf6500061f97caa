"""A command line from a dataclass: fields made by `option` or `switch` are options, other dataclasses are groups.

The result is typed and checked. No other module uses `argparse`.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, field, fields
from functools import wraps
from types import MappingProxyType
from typing import Any, TypeVar, get_origin, get_type_hints

T = TypeVar("T")
NOTHING: Mapping[str, Any] = MappingProxyType({})


def option(
    text: str, default: Any = MISSING, parse: Callable[[str], Any] = str, flag: str | None = None, **details: Any
) -> Any:
    """A field that is an option of the command line; if the field is a tuple, the option takes several values.

    Args:
        text: the help, to which the default is added.
        default: its value if not given; strings are parsed. Without a default the option is required.
        parse: turns text into a value, or raises ValueError with a sentence that names the fault.
        flag: the option's name, if it differs from the field's.
        details: further arguments of `argparse.ArgumentParser.add_argument`.
    """
    return field(default=default, metadata={"text": text, "parse": parse, "flag": flag, "details": details})


def switch(text: str) -> Any:
    """A field that is True if its option is given."""
    return field(default=False, metadata={"text": text, "flag": None, "details": {"action": "store_true"}})


def parse(
    kind: type[T],
    description: str | None,
    arguments: Sequence[str] | None = None,
    defaults: Mapping[str, Any] = NOTHING,
    demo: Mapping[str, Any] = NOTHING,
) -> T:
    """Fill the dataclass `kind` from the command line.

    `defaults` replaces the fields' own defaults, by name of field; with `--demo`, `demo` does.

    Exits with status 2 and one sentence if a value does not fit, or if `kind` raises ValueError.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    _add_options(parser, kind)
    parser.set_defaults(**defaults)
    if demo and parser.parse_known_args(arguments)[0].demo:
        parser.set_defaults(**demo)
    values = vars(parser.parse_args(arguments))
    try:
        return _filled(kind, values)
    except ValueError as error:
        parser.error(str(error))


def _add_options(parser: Any, kind: type) -> None:
    hints = get_type_hints(kind)
    for each in fields(kind):
        if each.metadata:
            _add_option(parser, each, is_tuple=get_origin(hints[each.name]) is tuple)
        else:
            group = hints[each.name]
            _add_options(parser.add_argument_group((group.__doc__ or "").partition(".")[0]), group)


def _add_option(parser: Any, each: Any, is_tuple: bool) -> None:
    data, text = each.metadata, each.metadata["text"]
    details: dict[str, Any] = {"nargs": "+"} if is_tuple else {}
    if "parse" in data:
        details |= {"type": _argument(data["parse"]), "required": each.default is MISSING}
        if each.default not in (MISSING, None, ()) and "(default" not in text:
            text += " (default: %(default)s)"
    name = data["flag"] or f"--{each.name.replace('_', '-')}"
    default = None if each.default is MISSING else each.default
    parser.add_argument(name, dest=each.name, default=default, help=text, **details | data["details"])


def _filled(kind: type[T], values: Mapping[str, Any]) -> T:
    hints = get_type_hints(kind)
    arguments = {
        each.name: _frozen(values[each.name]) if each.metadata else _filled(hints[each.name], values)
        for each in fields(kind)  # type: ignore[arg-type]
    }
    return kind(**arguments)


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _argument(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """`parse` with errors of the type that argparse shows in full."""

    @wraps(parse)
    def parse_argument(text: str) -> Any:
        try:
            return parse(text)
        except (ValueError, OSError) as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return parse_argument
