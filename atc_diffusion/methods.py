"""The methods: what each lets the user choose, and how it clusters."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypedDict

from torch import Tensor
from typing_extensions import Self, Unpack

from atc_diffusion.clustering import Backend, Linkage, check_choices, cluster_tree
from atc_diffusion.clustering.baselines import dpc_knn_labels, draw_destinations, kmedoids_labels, match
from atc_diffusion.clustering.tree import Cuttable
from atc_diffusion.clustering.windows import cluster_windows
from atc_diffusion.config import Features, Fractions, Levels, MergeConfig
from atc_diffusion.validation import check_count, is_count

Grid = tuple[int, int]

FORECAST_TOLERANCE = 0.5  # at which 2 to 9 of 20 steps are forecast, depending on the sampler


class OtherOptions(TypedDict, total=False):
    """The fields of `ATCConfig` but for `r` and `r_keys`, so that editors complete them as keywords."""

    features: Features
    proportional_attention: bool
    widen_heads: bool
    levels: Levels | int | Sequence[int]
    share_guidance: bool
    recluster_threshold: float
    forecast_tolerance: float
    record: bool
    linkage: Linkage
    window_size: int | None
    backend: Backend | None


class ATCOptions(OtherOptions, total=False):
    """The fields of `ATCConfig`, so that editors complete them as keywords."""

    r: Fractions
    r_keys: Fractions | None


@dataclass(frozen=True, kw_only=True)
class ATCConfig(MergeConfig):
    """Agglomerative Token Clustering (Haurum et al. 2024, section 3.2).

    By default one clustering is shared by all parts of guidance and reused until the latents have moved by
    `recluster_threshold`, at any number of steps. The presets `fast`, `faster`, `forecast` and `paper` take every field
    by keyword.

    Attributes:
        linkage: distance between clusters: "single", "complete", "average" (Eqs. 1-3, over cosine distance) or
            "ward" (over Euclidean distance; not in the paper).
        window_size: longest side, in tokens, of the windows that are clustered separately. None clusters the whole
            image at once, which stays a little closer to the unmerged image and takes longer the more tokens there are.
        backend: the implementation of the clustering, by a name that `agglomerate` takes; None: the fastest.
    """

    share_guidance: bool = True
    recluster_threshold: float = 0.15  # clusters 4 times in 4 steps, 7 in 8, 8 in 20, 9 in 50
    linkage: Linkage = "average"
    window_size: int | None = 16
    backend: Backend | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window_size is not None and not (is_count(self.window_size) and self.window_size >= 2):
            raise ValueError(f"window_size must be None or a side of at least 2 tokens, got {self.window_size!r}")
        check_choices(self.linkage, backend=self.backend)

    def cluster(self, features: Tensor, grid: Grid, timestep: Tensor, num_clusters: int) -> Cuttable:
        if self.window_size is None or self.window_size >= max(grid):
            return cluster_tree(features, num_clusters, self.linkage, backend=self.backend)
        return cluster_windows(features, num_clusters, grid, self.window_size, self.linkage, self.backend)

    @classmethod
    def fast(cls, r_keys: Fractions = 0.125, r: Fractions = 1.0, **options: Unpack[OtherOptions]) -> Self:
        """The fastest setting that stays close to the unmerged images: all queries, few keys.

        It merges every costly level, unless a mapping names the levels: one in Stable Diffusion 1 and 2, two in SDXL.
        Ward linkage keeps the spread within clusters small, and that spread is what merging keys loses.
        """
        by_level = isinstance(r, Mapping) or isinstance(r_keys, Mapping)
        preset: dict[str, Any] = {"levels": "finest" if by_level else "costly", "linkage": "ward"}
        return cls(r=r, r_keys=r_keys, **preset | dict(options))

    @classmethod
    def faster(cls, r_keys: Fractions = 0.125, r: Fractions = 1.0, **options: Unpack[OtherOptions]) -> Self:
        """`fast`, and forecasts some steps of a run that has at least 12."""
        preset: dict[str, Any] = {"forecast_tolerance": FORECAST_TOLERANCE}
        return cls.fast(r_keys, r, **preset | dict(options))

    @classmethod
    def forecast(cls, **options: Unpack[ATCOptions]) -> Self:
        """Forecasts as many steps as `faster`, and merges nothing."""
        preset: dict[str, Any] = {"r": 1.0, "forecast_tolerance": FORECAST_TOLERANCE}
        return cls(**preset | dict(options))

    @classmethod
    def paper(cls, r: Fractions, r_keys: Fractions | None = None, **options: Unpack[OtherOptions]) -> Self:
        """The setting of the paper's Table 2, after the authors' code: hidden states, plain means, no weights.

        Every attention is reclustered at every call, without windows.
        """
        preset: dict[str, Any] = {
            "features": "hidden_states",
            "proportional_attention": False,
            "window_size": None,
            "share_guidance": False,
            "recluster_threshold": 0.0,
        }
        return cls(r=r, r_keys=r_keys, **preset | dict(options))


@dataclass(frozen=True, kw_only=True)
class ToMeConfig(MergeConfig):
    """Token Merging for Stable Diffusion (Bolya & Hoffman 2023), the baseline; defaults as in their `tomesd`.

    Attributes:
        stride: side of the cells of which one token each may absorb others; no fewer than `1 / stride**2` of the
            tokens, queries or keys, can be kept.
        seed: of the draw of those tokens, which is repeated at every clustering.
    """

    features: Features = "hidden_states"
    proportional_attention: bool = False
    stride: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        check_count("stride", self.stride, "a whole number from 1 up")
        super().__post_init__()

    def cluster(self, features: Tensor, grid: Grid, timestep: Tensor, num_clusters: int) -> Cuttable:
        return match(features, draw_destinations(*grid, self.stride, self.seed, timestep.to(features.device)))

    def _check_fraction(self, name: str, fraction: object, progress: float | None) -> float:
        number = super()._check_fraction(name, fraction, progress)
        if number * self.stride**2 < 1:
            raise ValueError(
                f"ToMe with stride {self.stride} keeps at least {1 / self.stride**2:.4g} of the tokens, got {name}="
                f"{number}; use a larger {name} or stride, or ATCConfig"
            )
        return number


@dataclass(frozen=True, eq=False)
class Partitions:
    """Clusterings that do not nest: `labels` finds each number of clusters from scratch."""

    labels: Callable[..., Tensor]
    num_clusters: int = 1

    def cut(self, num_clusters: int) -> Tensor:
        return self.labels(num_clusters=num_clusters)


@dataclass(frozen=True, kw_only=True)
class KMedoidsConfig(MergeConfig):
    """A baseline: K-Medoids (Haurum et al. 2023), which reclusters for every number of clusters.

    Attributes:
        iterations: how often the medoids move.
    """

    iterations: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("iterations", self.iterations, "a whole number from 1 up")

    def cluster(self, features: Tensor, grid: Grid, timestep: Tensor, num_clusters: int) -> Cuttable:
        return Partitions(partial(kmedoids_labels, features, iterations=self.iterations))


@dataclass(frozen=True, kw_only=True)
class DPCKNNConfig(MergeConfig):
    """A baseline: density peaks by nearest neighbours (Du et al. 2016; Zeng et al. 2022, Eqs. 1-3).

    Attributes:
        neighbors: how many nearest tokens tell a token's density.
    """

    neighbors: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("neighbors", self.neighbors, "a whole number from 1 up")

    def cluster(self, features: Tensor, grid: Grid, timestep: Tensor, num_clusters: int) -> Cuttable:
        return Partitions(partial(dpc_knn_labels, features, neighbors=self.neighbors))
