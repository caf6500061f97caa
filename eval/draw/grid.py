"""The configurations to compare: every combination of the methods, shares kept, options and rivals asked for."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import product
from typing import Any

import yaml

from arguments import checks
from arguments.options import option
from atc_diffusion import ATCConfig, DPCKNNConfig, KMedoidsConfig, MergeConfig, ToMeConfig
from draw.configuration import Configuration
from draw.rivals import Rival

METHODS: dict[str, Callable[[float], MergeConfig]] = {
    "atc": lambda r: ATCConfig(r=r),
    "fast": lambda r: replace(ATCConfig.fast(), r=r),
    "faster": lambda r: replace(ATCConfig.faster(), r=r),
    "paper": ATCConfig.paper,
    "tome": lambda r: ToMeConfig(r=r),
    "kmedoids": lambda r: KMedoidsConfig(r=r),
    "dpc-knn": lambda r: DPCKNNConfig(r=r),
}
Shares = tuple[float, float | None]  # kept of queries and of keys; None: the same
Options = Mapping[str, Sequence[Any]]  # fields of a configuration, with the values to try


def parse_shares(text: str) -> Shares:
    """The shares of queries and of keys in "100/10", which are percentages; "50" is for both."""
    queries, _, keys = text.partition("/")
    return checks.percent(queries) / 100, checks.percent(keys) / 100 if keys else None


def parse_option(text: str) -> tuple[str, tuple[Any, ...]]:
    """A field of `ATCConfig` and the values to try, such as "linkage=average,ward"; values are YAML."""
    field, _, values = text.partition("=")
    known = [each.name for each in fields(ATCConfig) if each.name not in ("r", "r_keys")]
    if field not in known or not values:
        raise ValueError(f"expected FIELD=VALUE[,VALUE...] with a field of {', '.join(known)}; got {text!r}")
    parsed = yaml.safe_load(f"[{values}]")
    if any(isinstance(value, dict | list) for value in parsed):
        raise ValueError(f"expected plain values, got {text!r}")
    return field, tuple(parsed)


@dataclass(frozen=True)
class Ways:
    """configurations to compare"""

    keep: tuple[Shares, ...] = option(
        "percent of tokens kept, of queries and of keys: 100/12.5, or 50 for both; 100 with --method faster is "
        "forecasting alone (default: 40 50 60 70 80 90)",
        tuple((keep / 100, None) for keep in (40, 50, 60, 70, 80, 90)),
        parse_shares,
    )
    method: tuple[str, ...] = option(
        "atc: ATCConfig's defaults; fast and faster: its presets, for --keep 100/12.5; paper: the paper's setting; "
        "tome: ToMe as in its authors' code; kmedoids and dpc-knn: the paper's other baselines; none: only the "
        "unmerged model, which is always drawn (default: paper)",
        ("paper",),
        choices=[*METHODS, "none"],
    )
    options: tuple[tuple[str, tuple[Any, ...]], ...] = option(
        "fields of ATCConfig with the values to try, such as linkage=average,ward; all combinations are drawn; other "
        "methods take the fields that they have",
        (),
        parse_option,
        flag="--set",
    )
    rival: tuple[Rival, ...] = option(
        "other ways to draw faster: steps:0.7 (a share of the steps), todo:2 and pooled:2 (keys downsampled by that "
        "factor), tomesd:50 (percent kept), deepcache:3 and pab:3 (interval), spectrum:0.75 (growth of the window)",
        (),
        Rival.parse,
    )
    together: tuple[Rival, ...] = option(
        "rivals to combine with every way of merging, such as deepcache:2", (), Rival.parse, "--with"
    )

    def __post_init__(self) -> None:
        self.configurations()  # raises ValueError for values that a configuration refuses

    def configurations(self) -> list[Configuration]:
        """The unmerged model, every way of merging, each rival alone, and merging together with rivals."""
        merged = grid(self.method, self.keep, dict(self.options))
        alone = [Configuration(rival=rival) for rival in self.rival]
        both = [replace(each, rival=rival) for rival in self.together for each in merged if each.merge is not None]
        return list(dict.fromkeys([*merged, *alone, *both]))


def grid(methods: Iterable[str], keeps: Iterable[Shares], options: Options) -> list[Configuration]:
    """The unmerged model, then every method at every pair of shares kept with every combination of options.

    Each method takes the options that it has. ToMe is left out where it cannot keep so few tokens.

    Raises:
        ValueError: for a value that the configuration refuses.
    """
    combinations = [dict(zip(options, values, strict=True)) for values in product(*options.values())]
    merges = [
        _merge(method, share[0], share[1], combination)
        for method, combination, share in product(methods, combinations, keeps)
        if method != "none" and _can_keep(method, min(filter(None, share)), combination)
    ]
    return list(dict.fromkeys([Configuration(), *map(Configuration, merges)]))


def _can_keep(method: str, share: float, options: Mapping[str, Any]) -> bool:
    """Whether the method can keep this share; keeping all tokens makes sense only where steps are forecast."""
    if share == 1:
        return bool(options.get("forecast_tolerance", METHODS[method](1.0).forecast_tolerance))
    return method != "tome" or share * ToMeConfig.stride**2 >= 1


def _merge(method: str, r: float, r_keys: float | None, options: Mapping[str, Any]) -> MergeConfig:
    base = replace(METHODS[method](r), r_keys=r_keys)
    own = {field.name for field in fields(base)}
    return replace(base, **{name: value for name, value in options.items() if name in own})
