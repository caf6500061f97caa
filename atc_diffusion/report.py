"""Records of what merging did in a run, and the reports that `summary` and `merge_maps` make of them."""

from collections import Counter, defaultdict
from dataclasses import dataclass, field

from atc_diffusion.config import Configuration
from atc_diffusion.merge_map import MergeMap


@dataclass(frozen=True)
class RecordedMerge:
    """The clusters of one call of a self-attention.

    Attributes:
        network: the network's name in the pipeline, such as "unet".
        layer: the attention's path in the network.
        step: the entry of the scheduler's timesteps, from 0.
        grid: height and width of the grid of tokens.
        queries: how queries and the output were merged; None if they were not.
        keys: how keys and values were merged; None if they were not.
    """

    network: str
    layer: str
    step: int
    grid: tuple[int, int]
    queries: MergeMap | None
    keys: MergeMap | None


@dataclass(frozen=True)
class LayerSummary:
    """One patched self-attention and what its last run did.

    Attributes:
        network: the network's name in the pipeline, such as "unet".
        name: the attention's path in the network.
        level: the factor by which its grid of tokens is smaller than the latents, or than a vision transformer's image.
        channels: width of its tokens.
        tokens: how many there were; 0 before the first run.
        kept: queries kept, by step.
        kept_keys: keys and values kept, by step.
        clusterings: how often its tokens were clustered.
        projects_all: whether all tokens are projected, and keys and values merge after that.
        limit: why it merged less than it was asked to in some steps, as in "has ..."; empty if it did not.
    """

    network: str
    name: str
    level: int
    channels: int
    tokens: int = 0
    kept: tuple[int, ...] = ()
    kept_keys: tuple[int, ...] = ()
    clusterings: int = 0
    projects_all: bool = False
    limit: str = ""

    @property
    def work(self) -> float:
        """Multiplications of projections and attention over all steps; clustering is not counted."""
        return sum(map(self._work, self.kept, self.kept_keys))

    @property
    def unmerged_work(self) -> float:
        """The same without merging."""
        return len(self.kept) * self._work(self.tokens, self.tokens)

    def _work(self, queries: int, keys: int) -> float:
        projected = 2 * self.tokens if self.projects_all else queries + keys
        return 2 * self.channels * (self.channels * projected + queries * keys)


@dataclass(frozen=True)
class ForecastSummary:
    """What forecasting did in the last run.

    Attributes:
        steps: all steps of the run.
        forecast: those in which all calls were forecast.
        in_part: those in which some were, as where several images or parts of guidance are called apart.
        reasons: why calls of the others were computed, one for each step.
    """

    steps: tuple[int, ...] = ()
    forecast: tuple[int, ...] = ()
    in_part: tuple[int, ...] = ()
    reasons: tuple[str, ...] = ()

    def __str__(self) -> str:
        if not self.steps:
            return "no step forecast yet"
        steps = f"{len(self.steps)} step{'s' * (len(self.steps) != 1)}"
        kinds = ("", self.forecast), (" in part", self.in_part)
        said = [f"{len(at)} of {steps} forecast{kind}: {', '.join(map(str, at))}" for kind, at in kinds if at]
        return "; ".join(said) or f"none of {steps} forecast: {Counter(self.reasons).most_common(1)[0][0]}"


@dataclass(frozen=True)
class Summary:
    """What a patch does and what its last denoising run did; prints as a table."""

    config: Configuration
    layers: tuple[LayerSummary, ...]
    forecasts: ForecastSummary | None = None

    @property
    def work_saved(self) -> float:
        """Fraction of the arithmetic of the patched self-attentions that the last run saved, clustering not counted."""
        unmerged = sum(layer.unmerged_work for layer in self.layers)
        return 1 - sum(layer.work for layer in self.layers) / unmerged if unmerged else 0.0

    def __str__(self) -> str:
        header = ("layer", "level", "tokens", "queries", "keys", "clusterings")
        table = _table([header, *map(_row, self.layers)])
        saved = f"{self.work_saved:.0%} of the arithmetic of these attentions saved, clustering not counted"
        forecasts = [str(self.forecasts)] if self.forecasts else []
        return "\n".join([str(self.config), *table, *_limits(self.layers), saved, *forecasts])


def _row(layer: LayerSummary) -> tuple[str, ...]:
    name = f"{layer.network}.{layer.name}" if layer.network else layer.name
    return name, str(layer.level), str(layer.tokens), _span(layer.kept), _span(layer.kept_keys), str(layer.clusterings)


def _limits(layers: tuple[LayerSummary, ...]) -> list[str]:
    """What kept layers from merging, each reason with the number of layers that it holds for."""
    reasons = Counter(layer.limit for layer in layers if layer.limit)
    return [f"{count} of {len(layers)} merged less than asked: each {reason}" for reason, count in reasons.items()]


def _span(kept: tuple[int, ...]) -> str:
    """How many were kept; first and last where that changed."""
    if len(set(kept)) <= 1:
        return str(kept[0]) if kept else "-"
    return f"{kept[0]}..{kept[-1]}"


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]


@dataclass
class LayerLog:
    """Counts of one layer in a run: its tokens, how many were kept at each step, and its clusterings."""

    tokens: int = 0
    kept: dict[int, tuple[int, int]] = field(default_factory=dict)
    clusterings: int = 0
    limit: str = ""

    def add(self, step: int, tokens: int, kept: tuple[int, int], clustered: bool) -> None:
        self.tokens = tokens
        self.kept[step] = kept
        self.clusterings += clustered

    def summary(self, network: str, name: str, level: int, channels: int, projects_all: bool) -> LayerSummary:
        queries, keys = zip(*self.kept.values(), strict=True) if self.kept else ((), ())
        counts = self.tokens, queries, keys, self.clusterings
        return LayerSummary(network, name, level, channels, *counts, projects_all, self.limit)


@dataclass
class RunLog:
    """What happened in a run so far."""

    layers: defaultdict[str, LayerLog] = field(default_factory=lambda: defaultdict(LayerLog))
    merges: list[RecordedMerge] = field(default_factory=list)
    reasons: defaultdict[int, list[str]] = field(default_factory=lambda: defaultdict(list))

    def add_call(self, step: int, reason: str) -> None:
        """Note why a call was computed; "": it was forecast."""
        if reason not in self.reasons[step]:
            self.reasons[step].append(reason)

    def forecasts(self) -> ForecastSummary:
        forecast = tuple(step for step, reasons in self.reasons.items() if reasons == [""])
        in_part = tuple(step for step, reasons in self.reasons.items() if "" in reasons and any(reasons))
        computed = tuple(next(filter(None, reasons)) for reasons in self.reasons.values() if any(reasons))
        return ForecastSummary(tuple(self.reasons), forecast, in_part, computed)
