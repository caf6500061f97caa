"""The rows of the table: how tokens are merged, from the command line to a name in the report."""

import argparse
import inspect
import re
import types
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import product
from typing import Any, cast, get_args, get_origin, get_type_hints

from atc_diffusion import ATCConfig, MergeConfig, ToMeConfig

METHODS: dict[str, type[MergeConfig]] = {"atc": ATCConfig, "tome": ToMeConfig}


@dataclass(frozen=True)
class Configuration:
    """One way to generate: merging as `merge` says, or (None) not at all."""

    merge: MergeConfig | None = None

    @property
    def keep(self) -> float:
        """Tokens kept, in percent."""
        return 100.0 if self.merge is None else round(100 * cast(float, self.merge.r), 6)

    @property
    def choices(self) -> dict[str, Any]:
        """What was chosen, by field; "method" is ToMe, or ATC with its linkage.

        Without the share kept, which tables have columns for, and the backend, which changes no cluster.
        """
        if self.merge is None:
            return {"method": "unmerged"}
        choices = {field: value for field, value in asdict(self.merge).items() if field not in ("r", "backend")}
        if "linkage" not in choices:
            return {"method": "ToMe"} | choices
        return {"method": f"ATC {choices.pop('linkage')}"} | choices

    @property
    def label(self) -> str:
        """The method, and every choice that is not the paper's."""
        if self.merge is None:
            return "unmerged"
        default = Configuration(_default(type(self.merge), self.keep / 100)).choices
        changed = (field for field in self.choices if field != "method" and self.choices[field] != default[field])
        return ", ".join([self.choices["method"], *(describe(field, self.choices[field]) for field in changed)])

    @property
    def folder(self) -> str:
        """Name of the folder for its pictures."""
        slug = re.sub(r"[^a-z0-9]+", "-", self.label.lower())
        return slug if self.merge is None else f"{slug}_{self.keep:g}"

    @property
    def json(self) -> dict[str, Any]:
        """The configuration as JSON; `from_json` reads it."""
        return {} if self.merge is None else {"method": type(self.merge).__name__, **asdict(self.merge)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Configuration":
        if not values:
            return cls()
        kinds = {kind.__name__: kind for kind in METHODS.values()}
        options: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}
        return cls(kinds[options.pop("method")](**options))


def describe(field: str, value: object) -> str:
    """One choice in words: "features keys", "no proportional attention"."""
    name = field.replace("_", " ")
    if isinstance(value, bool):
        return name if value else f"no {name}"
    return f"{name} {' + '.join(value) if isinstance(value, tuple) else value}"


def grid(methods: Sequence[str], keeps: Iterable[float], options: dict[str, list[Any]]) -> list[Configuration]:
    """The unmerged model, then every method at every share kept (percent) with every combination of options.

    ToMe is left out where it cannot keep so few tokens, and takes the options that it has.

    Raises:
        ValueError: for a value that the configuration refuses.
    """
    shares = [_share(keep) for keep in keeps if keep != 100]
    combinations = [dict(zip(options, values, strict=True)) for values in product(*options.values())]
    merges = [
        _merge(METHODS[method], r, combination)
        for method in methods
        if method != "none"
        for combination in combinations
        for r in shares
        if method != "tome" or r * ToMeConfig.stride**2 >= 1
    ]
    return list(dict.fromkeys([Configuration(), *map(Configuration, merges)]))


def _share(keep: float) -> float:
    if not 1 <= keep <= 100:
        hint = f"; did you mean {100 * keep:g}?" if 0 < keep < 1 else ""
        raise ValueError(f"--keep is the percentage of tokens kept, from 1 to 100, got {keep:g}{hint}")
    return keep / 100


def _default(kind: type[MergeConfig], r: float) -> MergeConfig:
    """The paper's setting of a method."""
    return ATCConfig.paper(r) if kind is ATCConfig else kind(r=r)


def _merge(kind: type[MergeConfig], r: float, options: dict[str, Any]) -> MergeConfig:
    own = {field.name for field in fields(kind)}
    return replace(_default(kind, r), **{name: value for name, value in options.items() if name in own})


def add_merge_options(parser: argparse.ArgumentParser) -> None:
    """An option for every field of `ATCConfig` but `r`; each takes one or more values."""
    group = parser.add_argument_group(
        "how tokens are merged",
        "The fields of ATCConfig; by default as in the paper's table. Several values give every combination of them;\n"
        "a value with several parts is written with commas. ToMe takes the fields that it has.",
    )
    hints, helps, paper = get_type_hints(ATCConfig), _field_helps(ATCConfig), ATCConfig.paper(1.0)
    for field in fields(ATCConfig):
        if field.name != "r":
            default = getattr(paper, field.name)
            group.add_argument(
                f"--{option_name(field.name).replace('_', '-')}",
                nargs="+",
                type=_parser(hints[field.name]),
                metavar="VALUE",
                help=f"{helps[field.name]} (default: {_written(default)})".replace("%", "%%"),
            )


def option_name(field: str) -> str:
    """The option's name for a field of `ATCConfig`; `--features` is the network that scores."""
    return "token_features" if field == "features" else field


def merge_options(args: argparse.Namespace) -> dict[str, list[Any]]:
    """The options of `add_merge_options` that were given."""
    values = {field.name: getattr(args, option_name(field.name), None) for field in fields(ATCConfig)}
    return {name: value for name, value in values.items() if value is not None}


def _field_helps(kind: type) -> dict[str, str]:
    """What the docstrings of `kind` and its bases say about each of its attributes."""
    docs = "\n".join(inspect.getdoc(base) or "" for base in kind.__mro__[:-1])
    entries = re.findall(r"^ {4}(\w+): (.+(?:\n {8}.+)*)", docs, re.MULTILINE)
    helps = {name: re.sub(r"\s+", " ", text) for name, text in entries}
    return {field.name: helps.get(field.name, "") for field in fields(kind)}


def _parser(hint: Any) -> Callable[[str], Any]:
    """Reads a value of the annotated type `hint` from the command line."""
    if get_origin(hint) is types.UnionType:
        inner = _parser(get_args(hint)[0])
        return lambda text: None if text.lower() == "none" else inner(text)
    if get_origin(hint) is tuple:
        return lambda text: tuple(text.split(","))
    return _flag if hint is bool else hint


def _flag(text: str) -> bool:
    values = {"true": True, "false": False, "yes": True, "no": False, "on": True, "off": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"expected on or off, got {text!r}")
    return values[text.lower()]


def _written(value: object) -> str:
    """`value` as `_parser` would read it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return ",".join(value) if isinstance(value, tuple) else str(value).lower()
