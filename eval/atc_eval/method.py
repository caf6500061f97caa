"""What is compared: merging, a rival, both, or the model as it is."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields
from typing import Any

from atc_diffusion import ATCConfig, DPCKNNConfig, KMedoidsConfig, MergeConfig, ToMeConfig, ViTConfig, patched
from atc_eval.rivals import Draw, Rival

Config = MergeConfig | ViTConfig
BASES: dict[str, Config] = {
    "ATCConfig": ATCConfig(),
    "ATCConfig.fast": ATCConfig.fast(),
    "ATCConfig.faster": ATCConfig.faster(),
    "ATCConfig.forecast": ATCConfig.forecast(),
    "ATCConfig.paper": ATCConfig.paper(1.0),
    "ToMeConfig": ToMeConfig(),
    "KMedoidsConfig": KMedoidsConfig(),
    "DPCKNNConfig": DPCKNNConfig(),
    "ViTConfig": ViTConfig(r=1.0),
}
KINDS: dict[str, Any] = {type(base).__name__: type(base) for base in BASES.values()}
NOT_NAMED = ("r", "r_keys", "t", "schedule", "backend", "record")  # the strength, and what changes no cluster
# For image sets of earlier versions: fields that they lack, with the values that they were drawn with;
# and removed fields, with the values at which they did nothing.
ADDED: Mapping[str, Any] = {"forecast_tolerance": 0.0, "widen_heads": False}
REMOVED: Mapping[str, Any] = {"share_layers": 1}


@dataclass(frozen=True)
class Method:
    """One method at one strength; by default, the unmerged model."""

    config: Config | None = None
    rival: Rival | None = None

    def __str__(self) -> str:
        return ", ".join(filter(None, [self.label, self.setting]))

    @property
    def is_unmerged(self) -> bool:
        return self == Method()

    @property
    def label(self) -> str:
        """The code of its configuration without the strength, and the rival."""
        names = [call(self.config) if self.config else "", self.rival.kind.label if self.rival else ""]
        return " + ".join(filter(None, names)) or "unmerged"

    @property
    def setting(self) -> str:
        """The strength in words: fractions kept, tokens removed, and the rival's own strength."""
        rival = self.rival.kind.setting(self.rival.strength) if self.rival else ""
        return ", ".join(filter(None, [_strength(self.config) if self.config else "", rival]))

    @property
    def keep(self) -> float | None:
        """The percentage of tokens kept, if that is its only strength."""
        config = self.config
        if config is None or self.rival is not None or config.r is None or getattr(config, "r_keys", None) is not None:
            return None
        r: Any = config.r  # a number: no command gives functions or mappings
        return round(100 * r, 6)

    @property
    def folder(self) -> str:
        """A name for files; it differs for any two methods."""
        return re.sub(r"[^a-z0-9.]+", "-", f"{self.label} {self.setting}".lower()).strip("-")

    @property
    def json(self) -> dict[str, Any]:
        """The method as JSON; `from_json` reads it."""
        config = {"kind": type(self.config).__name__, **asdict(self.config)} if self.config else None
        return {"merge": config, "rival": asdict(self.rival) if self.rival else None}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Method":
        """Read what this or an earlier version wrote."""
        config, rival = values["merge"], values["rival"]
        return cls(_read(config) if config else None, Rival(**rival) if rival else None)

    @contextmanager
    def applied(self, model: Any) -> Iterator[Draw]:
        """Make `model` compute this way within a `with` block; yields the callable to call."""
        merging = patched(model, self.config) if self.config else nullcontext()
        with merging, self.rival.applied(model) if self.rival else nullcontext(model) as draw:
            yield draw

    def instead(self, other: "Method") -> str | None:
        """What `other` has instead, if exactly one choice that both have differs; None if it is a rival."""
        mine, others = self._choices, other._choices
        differing = [name for name in mine if name in others and mine[name] != others[name]]
        if len(differing) != 1 or differing == ["rival"]:
            return None
        [name] = differing
        return other.label if name == "kind" else f"{name}={others[name]!r}"

    @property
    def _choices(self) -> dict[str, Any]:
        config = {name: value for name, value in asdict(self.config).items() if name not in NOT_NAMED}  # type: ignore[arg-type]
        return {"kind": type(self.config), "rival": self.rival and self.rival.name} | config


def call(config: Config) -> str:
    """The shortest code that makes `config`, without its strength."""
    return min((_call(name, base, config) for name, base in BASES.items() if type(base) is type(config)), key=len)


def _call(name: str, base: Config, config: Config) -> str:
    names = [field.name for field in fields(config) if field.name not in NOT_NAMED]
    changed = [f"{name}={getattr(config, name)!r}" for name in names if getattr(config, name) != getattr(base, name)]
    return f"{name}({', '.join(changed)})"


def _strength(config: Config) -> str:
    if config.r is None:
        return f"{config.schedule}, t = {config.t}"
    r_keys = getattr(config, "r_keys", None)
    if r_keys is None:
        return _percent(config.r)
    return f"keys {_percent(r_keys)}" if config.r == 1 else f"{_percent(config.r)}, keys {_percent(r_keys)}"


def _percent(fraction: Any) -> str:
    return f"{100 * fraction:.6g} %"


def _read(values: Mapping[str, Any]) -> Config:
    if values["kind"] not in KINDS:
        raise ValueError(f"this version has no {values['kind']}")
    kind = KINDS[values["kind"]]
    known = {field.name for field in fields(kind)}
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    for name, value in given.items():
        if name not in known | {"kind"} and value != REMOVED.get(name, ...):
            raise ValueError(f"this version has no {values['kind']}({name}={value!r})")
    added = {name: value for name, value in ADDED.items() if name in known}
    return kind(**added | {name: value for name, value in given.items() if name in known})
