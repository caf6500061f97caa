"""One way to draw: merging, a rival, both or neither, and its names in folders and reports."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any, cast

from atc_diffusion import ATCConfig, DPCKNNConfig, KMedoidsConfig, MergeConfig, ToMeConfig, patched
from draw.rivals import Draw, Rival

_BASELINES: dict[type[MergeConfig], str] = {ToMeConfig: "ToMe", KMedoidsConfig: "K-Medoids", DPCKNNConfig: "DPC-KNN"}
_KINDS: dict[str, type[MergeConfig]] = {"ATCConfig": ATCConfig} | {kind.__name__: kind for kind in _BASELINES}
# Fields that are no choice of a method: the strength, and what changes no cluster.
_OTHER_FIELDS = ("r", "r_keys", "backend", "record")


@dataclass(frozen=True)
class Configuration:
    """One way to draw: merging as `merge` says, a rival, both, or (neither) the unmerged model."""

    merge: MergeConfig | None = None
    rival: Rival | None = None

    @property
    def is_unmerged(self) -> bool:
        return self == Configuration()

    @property
    def label(self) -> str:
        """The method: how tokens are merged, with every choice that is not the default, and the rival."""
        return self._label(_merge_label)

    @property
    def setting(self) -> str:
        """The strength in words: shares kept, and the rival's own."""
        return self._setting(_merge_setting)

    @property
    def strength(self) -> list[float]:
        """The shares kept of queries and of keys, and the rival's own, as far as there are any."""
        shares = [self.merge.r, self.merge.r_keys] if self.merge else []
        values = [*shares, self.rival.strength if self.rival else None]
        return [cast(float, value) for value in values if value is not None]

    @property
    def keep(self) -> float | None:
        """The percentage of tokens kept, where that is the only strength."""
        if self.merge is None or self.rival is not None or self.merge.r_keys is not None:
            return None
        return round(100 * cast(float, self.merge.r), 6)

    @property
    def choices(self) -> dict[str, Any]:
        """What was chosen, by field, but for the strength; "method" is ToMe, or ATC with its linkage."""
        if self.merge is None:
            return {"method": self.label}
        rival = self.rival.kind.label if self.rival else None
        return _choices(self.merge) | {"rival": rival}

    @property
    def folder(self) -> str:
        """Name of the folder for its pictures, with every choice: no other configuration may write there."""
        return re.sub(r"[^a-z0-9.]+", "-", f"{self._label(_method)} {self._setting(_shares)}".lower()).strip("-")

    @property
    def json(self) -> dict[str, Any]:
        """The configuration as JSON; `from_json` reads it."""
        merge = {"kind": type(self.merge).__name__, **asdict(self.merge)} if self.merge else None
        return {"merge": merge, "rival": asdict(self.rival) if self.rival else None}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Configuration":
        merge, rival = dict(values["merge"] or {}), values["rival"]
        kind: Any = _KINDS[merge.pop("kind")] if merge else None
        fields: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in merge.items()
        }
        return cls(kind(**fields) if kind else None, Rival(**rival) if rival else None)

    @contextmanager
    def applied(self, pipe: Any) -> Iterator[Draw]:
        """`pipe` drawing this way, for the length of a `with` block; yields what draws."""
        with patched(pipe, self.merge) if self.merge else nullcontext(), self._rival(pipe) as draw:
            yield draw

    def _label(self, name: Callable[[MergeConfig], str]) -> str:
        parts = [name(self.merge)] if self.merge else []
        return " + ".join([*parts, self.rival.kind.label] if self.rival else parts) or "unmerged"

    def _setting(self, name: Callable[[MergeConfig], str]) -> str:
        parts = [name(self.merge)] if self.merge else []
        return ", ".join([*parts, self.rival.kind.setting(self.rival.strength)] if self.rival else parts)

    def _rival(self, pipe: Any) -> Any:
        return self.rival.applied(pipe) if self.rival else nullcontext(pipe)


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


def _merge_label(merge: MergeConfig) -> str:
    return "forecasting alone" if _keeps_all(merge) else _method(merge)


def _merge_setting(merge: MergeConfig) -> str:
    return f"tolerance {merge.forecast_tolerance:g}" if _keeps_all(merge) else _shares(merge)


def _method(merge: MergeConfig) -> str:
    """The method and what differs from its defaults, or from the paper's setting if that is less."""
    choices = _choices(merge)
    if type(merge) in _BASELINES:
        return ", ".join([choices["method"], *_differences(choices, type(merge)())])
    from_default, from_paper = _differences(choices, ATCConfig()), _differences(choices, ATCConfig.paper(1.0))
    if len(from_default) <= len(from_paper) + 1:
        return ", ".join([choices["method"], *from_default])
    return ", ".join([choices["method"], "the paper's", *from_paper])


def _differences(choices: dict[str, Any], base: MergeConfig) -> list[str]:
    others = _choices(base)
    return [describe(field, value) for field, value in choices.items() if field != "method" and value != others[field]]


def _keeps_all(merge: MergeConfig) -> bool:
    """Whether steps are forecast and nothing is merged."""
    return merge.r == 1 and merge.r_keys is None


def _shares(merge: MergeConfig) -> str:
    keys = merge.r_keys
    texts = [_percent(merge.r)] if keys is None or merge.r != 1 else []
    return ", ".join(texts if keys is None else [*texts, f"keys {_percent(keys)}"])


def _percent(share: object) -> str:
    return f"{100 * cast(float, share):.6g} %"
