"""The methods to compare: all combinations of configurations, fractions kept and options, and the rivals."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import product
from typing import Any

import yaml

from atc_diffusion import ATCConfig, DPCKNNConfig, KMedoidsConfig, MergeConfig, ToMeConfig
from atc_eval.command_line import parse_fraction, several
from atc_eval.method import Method
from atc_eval.rivals import Rival

Fractions = tuple[float, float | None]  # kept of queries and of keys; None: the same


CONFIGS: dict[str, list[Callable[..., MergeConfig]]] = {
    "table2": [
        ToMeConfig,
        *(partial(ATCConfig.paper, linkage=linkage) for linkage in ("single", "average", "complete")),
    ],
    "paper": [ATCConfig.paper],
    "atc": [ATCConfig],
    "fast": [ATCConfig.fast],
    "faster": [ATCConfig.faster],
    "forecast": [ATCConfig.forecast],
    "tome": [ToMeConfig],
    "kmedoids": [KMedoidsConfig],
    "dpc-knn": [DPCKNNConfig],
    "none": [],
}


@dataclass(frozen=True)
class Comparison:
    """Which methods are compared with the unmerged model, which is always drawn."""

    _argument_group_name = "methods to compare"
    keep: list[str] = several(
        ["40", "50", "60", "70", "80", "90"], "percent of tokens kept, of queries and of keys: 100/12.5, or 50 for both"
    )
    method: list[str] = several(
        ["table2"],
        "table2: ToMe, and ATC in the paper's setting by single, average and complete linkage; paper: ATC in the "
        "paper's setting; atc: ATCConfig's defaults; fast, faster and forecast: its presets, for --keep 100/12.5 and, "
        "the last, 100; tome: ToMe as in its authors' code; kmedoids and dpc-knn: the paper's other baselines; none: "
        "only the unmerged model",
        list(CONFIGS),
    )
    set: list[str] = several(
        [],
        "fields of ATCConfig with the values to try, such as linkage=average,ward; all combinations are drawn; other "
        "methods take the fields that they have",
    )
    rival: list[str] = several(
        [],
        "other ways to draw faster: steps:0.7 (a fraction of the steps), todo:2 and pooled:2 (keys downsampled by that "
        "factor), tomesd:50 (percent kept), deepcache:3 and pab:3 (interval), spectrum:0.75 (window's growth), "
        "easycache:0.1 (threshold)",
    )
    together: list[str] = several([], "rivals to add to every merging, such as deepcache:2", aliases=["--with"])

    def __post_init__(self) -> None:
        self.methods()  # raises ValueError for values that do not fit

    def methods(self) -> list[Method]:
        """The unmerged model, every merging, each rival alone, and merging together with rivals."""
        options: dict[str, tuple[Any, ...]] = {}
        for field, values in map(parse_option, self.set):  # a field may be given twice
            options[field] = options.get(field, ()) + values
        merged = grid(self.method, [parse_fractions(text) for text in self.keep], options)
        if self.together and not any(each.config for each in merged):
            raise ValueError(
                f"--with {' '.join(self.together)} combines rivals with merging, but nothing merges; give another "
                "--method or --keep, or use --rival"
            )
        alone = [Method(rival=Rival.parse(text)) for text in self.rival]
        both = [replace(each, rival=Rival.parse(text)) for text in self.together for each in merged if each.config]
        return list(dict.fromkeys([*merged, *alone, *both]))


def parse_fractions(text: str) -> Fractions:
    """The fractions of queries and of keys in "100/10", which are percentages; "50" is for both."""
    queries, slash, keys = text.partition("/")
    parse = partial(parse_fraction, option=f"--keep {text}", example="50 or 100/12.5")
    return parse(queries), parse(keys) if slash else None


def parse_option(text: str) -> tuple[str, tuple[Any, ...]]:
    """A field of `ATCConfig` and the values to try, such as "linkage=average,ward"; values are YAML."""
    field, _, values = text.partition("=")
    known = [each.name for each in fields(ATCConfig) if each.name not in ("r", "r_keys")]
    if field not in known or not values:
        raise ValueError(f"--set: expected FIELD=VALUE[,VALUE...] with a field of {', '.join(known)}; got {text!r}")
    try:
        parsed = yaml.safe_load(f"[{values}]")
    except yaml.YAMLError:
        parsed = None
    if not parsed or any(isinstance(value, dict | list) for value in parsed):
        raise ValueError(f"--set: expected plain values separated by commas, got {text!r}")
    return field, tuple(parsed)


def grid(names: Iterable[str], keeps: Iterable[Fractions], options: Mapping[str, Sequence[Any]]) -> list[Method]:
    """The unmerged model, then the configurations of every name at all fractions kept, with all options that they have.

    ToMe is left out where it cannot keep so few tokens, and merging where it keeps all and forecasts nothing.
    """
    combinations = [dict(zip(options, values, strict=True)) for values in product(*options.values())]
    configs = [
        replace(base, r_keys=r_keys, **{name: value for name, value in combination.items() if hasattr(base, name)})
        for name, combination in product(names, combinations)
        for make, (r, r_keys) in product(CONFIGS[name], keeps)
        if make is not ToMeConfig or min(r, r_keys or r) * ToMeConfig.stride**2 >= 1
        for base in [make(r=r)]
    ]
    merging = [each for each in configs if (each.r, each.r_keys) not in ((1, None), (1, 1)) or each.forecast_tolerance]
    return list(dict.fromkeys([Method(), *map(Method, merging)]))
