"""One way to draw (merging, a rival, both or neither) and its names in folders and reports."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from operator import attrgetter
from typing import Any, cast

from atc_diffusion import ATCConfig, DPCKNNConfig, KMedoidsConfig, MergeConfig, ToMeConfig, patched
from draw.rivals import Draw, Rival

_BASELINES: dict[type[MergeConfig], str] = {ToMeConfig: "ToMe", KMedoidsConfig: "K-Medoids", DPCKNNConfig: "DPC-KNN"}
_KINDS: dict[str, type[MergeConfig]] = {"ATCConfig": ATCConfig} | {kind.__name__: kind for kind in _BASELINES}
_rival_label, _rival_setting = attrgetter("label"), attrgetter("setting")
_PRESETS = {"ATC fast": ATCConfig.fast(), "ATC faster": ATCConfig.faster()}
# Fields that do not belong to a method: its strength, and those that change no cluster.
_OTHER_FIELDS = ("r", "r_keys", "backend", "record")


@dataclass(frozen=True)
class Configuration:
    """One way to draw: merging, a rival, both, or (neither) the unmerged model."""

    merge: MergeConfig | None = None
    rival: Rival | None = None

    @property
    def is_unmerged(self) -> bool:
        return self == Configuration()

    @property
    def label(self) -> str:
        """The method with every choice that differs from its defaults, and the rival."""
        return " + ".join(self._words(_label, _rival_label)) or "unmerged"

    @property
    def setting(self) -> str:
        """The strength in words: shares kept, and the rival's own strength."""
        return ", ".join(self._words(_setting, _rival_setting))

    @property
    def strength(self) -> list[float]:
        """The shares of queries and of keys kept, and the rival's strength, as far as each is set."""
        shares = [self.merge.r, self.merge.r_keys] if self.merge else []
        values = [*shares, self.rival.strength if self.rival else None]
        return [cast(float, value) for value in values if value is not None]

    @property
    def keep(self) -> float | None:
        """The percentage of tokens kept, if that is the only strength."""
        if self.merge is None or self.rival is not None or self.merge.r_keys is not None:
            return None
        return round(100 * cast(float, self.merge.r), 6)

    @property
    def choices(self) -> dict[str, Any]:
        """Every choice by field, without the strength; "method" is ToMe, or ATC with its linkage."""
        if self.merge is None:
            return {"method": self.label}
        return _choices(self.merge) | {"rival": self.rival.label if self.rival else None}

    @property
    def folder(self) -> str:
        """Name of the folder for its pictures; it differs for any two configurations."""
        words = [*self._words(_method, _rival_label), *self._words(_shares, _rival_setting)] or ["unmerged"]
        return re.sub(r"[^a-z0-9.]+", "-", " ".join(words).lower()).strip("-")

    @property
    def json(self) -> dict[str, Any]:
        """The configuration as JSON; `from_json` reads it."""
        merge = {"kind": type(self.merge).__name__, **asdict(self.merge)} if self.merge else None
        return {"merge": merge, "rival": asdict(self.rival) if self.rival else None}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Configuration":
        merge, rival = dict(values["merge"] or {}), values["rival"]
        kind: Any = _KINDS[merge.pop("kind")] if merge else None
        fields = {name: tuple(value) if isinstance(value, list) else value for name, value in merge.items()}
        return cls(kind(**fields) if kind else None, Rival(**rival) if rival else None)

    @contextmanager
    def applied(self, pipe: Any) -> Iterator[Draw]:
        """Make `pipe` draw this way within a `with` block; yields the callable that draws."""
        merging = patched(pipe, self.merge) if self.merge else nullcontext()
        with merging, self.rival.applied(pipe) if self.rival else nullcontext(pipe) as draw:
            yield draw

    def _words(self, merging: Callable[[MergeConfig], str], rival: Callable[[Rival], str]) -> Iterator[str]:
        if self.merge:
            yield merging(self.merge)
        if self.rival:
            yield rival(self.rival)


def describe(field: str, value: object) -> str:
    """One choice in words: "features keys", "no proportional attention", "costly levels"."""
    name = field.replace("_", " ")
    if field == "levels" and isinstance(value, str):
        return f"{value} levels"
    if isinstance(value, bool):
        return name if value else f"no {name}"
    return f"{name} {'off' if value is None else value}"


def _choices(merge: MergeConfig) -> dict[str, Any]:
    choices = {field: value for field, value in asdict(merge).items() if field not in _OTHER_FIELDS}
    if "linkage" not in choices:
        return {"method": _BASELINES[type(merge)]} | choices
    return {"method": f"ATC {choices.pop('linkage')}"} | choices


def _label(merge: MergeConfig) -> str:
    return "forecasting alone" if _merges_nothing(merge) else _method(merge)


def _setting(merge: MergeConfig) -> str:
    return f"tolerance {merge.forecast_tolerance:g}" if _merges_nothing(merge) else _shares(merge)


def _merges_nothing(merge: MergeConfig) -> bool:
    return merge.r == 1 and merge.r_keys is None


def _method(merge: MergeConfig) -> str:
    """A preset, or the method and how it differs from the defaults (from the paper's setting if that says less)."""
    choices = _choices(merge)
    for name, preset in _PRESETS.items():
        if choices == _choices(preset):
            return name
    if type(merge) in _BASELINES:
        return ", ".join([choices["method"], *_differences(choices, type(merge)())])
    from_default, from_paper = _differences(choices, ATCConfig()), _differences(choices, ATCConfig.paper(1.0))
    if len(from_default) <= len(from_paper) + 1:
        return ", ".join([choices["method"], *from_default])
    return ", ".join([choices["method"], "the paper's", *from_paper])


def _differences(choices: dict[str, Any], base: MergeConfig) -> list[str]:
    others = _choices(base)
    return [describe(field, value) for field, value in choices.items() if field != "method" and value != others[field]]


def _shares(merge: MergeConfig) -> str:
    keys = None if merge.r_keys is None else f"keys {_percent(merge.r_keys)}"
    queries = _percent(merge.r) if keys is None or merge.r != 1 else None
    return ", ".join(filter(None, [queries, keys]))


def _percent(share: object) -> str:
    return f"{100 * cast(float, share):.6g} %"
