"""What to merge and how: choices, validated when they are made."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import cast

from torch import Tensor

from atc_diffusion.clustering import agglomerate, check_choices, check_member
from atc_diffusion.clustering.windows import agglomerate_windows, num_windows
from atc_diffusion.merge_map import MergeMap
from atc_diffusion.tome import bipartite_labels, draw_destinations

Share = float | Callable[[float], float]

FEATURES = ("keys", "values", "keys_values", "hidden_states")
MERGES = ("tokens", "keys_values")
MODULES = ("self_attention", "cross_attention", "mlp")


@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """What every way of merging has in common.

    Attributes:
        r: share of tokens **kept**, in (0, 1]: `N` tokens become `max(1, round(r * N))`. Or a function that gives the
            share for the progress of denoising, from 0 (noise) to 1; or a mapping from the levels to be patched, by
            their downsampling factor, to either: `{1: 0.4, 2: 0.8}`.
        features: what is compared: the self-attention's "keys" (as the ATC paper's text says), its "values", both
            ("keys_values", each scaled to unit deviation), or the block's input before `norm1` ("hidden_states",
            as the authors' code does).
        proportional_attention: add the logarithm of the cluster size to the attention logits, so that a merged
            token weighs as much as its members did (Bolya et al. 2023, Eq. 1).
        merge: "tokens" merges the input of a module and un-merges its output; "keys_values" keeps every query of
            the self-attention and merges only what it attends to.
        max_downsample: patch the levels of the UNet down to this factor (1, 2, 4, ...). None: the finest level
            that has self-attention, which is 1 in Stable Diffusion 1 and 2, and 2 in SDXL. Not with a mapping for r.
        modules: any of "self_attention", "cross_attention" (its queries) and "mlp".
        share_guidance: group the tokens of a picture once for all parts of its classifier-free guidance, by the
            features of the last, which is the conditional one in Stable Diffusion. Which items of a batch are such
            parts is found out, so that this begins at a run's second step.
        share_layers: let the grouping of a level's first layer serve its other layers.
        refresh_every: how many denoising steps one grouping serves.

    Raises:
        ValueError: naming the value that does not fit and what would.
    """

    r: Share | Mapping[int, Share] = 0.6
    features: str = "keys"
    proportional_attention: bool = True
    merge: str = "tokens"
    max_downsample: int | None = None
    modules: tuple[str, ...] = ("self_attention",)
    share_guidance: bool = False
    share_layers: bool = False
    refresh_every: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.r, Mapping):
            self._check_levels(self.r)
        for share in self.r.values() if isinstance(self.r, Mapping) else [self.r]:
            _check_share(share)
        check_member("features", self.features, FEATURES)
        check_member("merge", self.merge, MERGES)
        if not isinstance(self.modules, tuple) or not self.modules:
            raise ValueError(f"modules must be a tuple such as ('self_attention', 'mlp'), got {self.modules!r}")
        for module in self.modules:
            check_member("every entry of modules", module, MODULES)
        if self.max_downsample is not None and not (isinstance(self.max_downsample, int) and self.max_downsample >= 1):
            raise ValueError(f"max_downsample must be None or a factor 1, 2, 4, ..., got {self.max_downsample!r}")
        if not isinstance(self.refresh_every, int) or self.refresh_every < 1:
            raise ValueError(f"refresh_every must be a number of steps from 1 up, got {self.refresh_every!r}")

    def _check_levels(self, r: Mapping[int, Share]) -> None:
        if not r or not all(isinstance(level, int) and level >= 1 for level in r):
            raise ValueError(f"r by level needs downsampling factors as keys, such as {{1: 0.4, 2: 0.8}}, got {r!r}")
        if self.max_downsample is not None:
            raise ValueError(f"r={r!r} names the levels; leave out max_downsample={self.max_downsample}")

    def at(self, downsample: int, progress: float | None) -> "MergeConfig":
        """The same choices at one level and moment, where `r` is a number."""
        r = self.r[downsample] if isinstance(self.r, Mapping) else self.r
        if callable(r):
            if progress is None:
                raise ValueError(
                    "r is a function of the progress of denoising, which this timestep does not tell; call the UNet"
                    " with an entry of scheduler.timesteps or a number"
                )
            r = r(progress)
        return self if r is self.r else replace(self, r=r)

    def num_clusters(self, num_tokens: int) -> int:
        """How many of `num_tokens` tokens are kept; `r` must be a number."""
        return max(1, round(cast(float, self.r) * num_tokens))

    def merge_map(self, features: Tensor, grid: tuple[int, int], step: Tensor) -> MergeMap:
        """Group tokens by their `features` `[B, N, C]`; `r` must be a number.

        Args:
            features: what tokens are compared by.
            grid: height and width of the tokens' grid; their product is `N`.
            step: scalar tensor, the denoising timestep.
        """
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class ATCConfig(MergeConfig):
    """Agglomerative Token Clustering (Haurum et al. 2024, section 3.2).

    By default a grouping serves both parts of guidance and three steps, which changes pictures hardly more than merging
    does (eval/results) and costs a sixth; `paper` groups anew for each.

    Attributes:
        linkage: distance between clusters: "single", "complete", "average" (Eqs. 1-3, over cosine distance) or
            "ward" (over Euclidean distance; not in the paper).
        window: side of the windows, in tokens, that are clustered each on its own; None for the whole picture at once.
        backend: what clusters: "torch", "triton" (CUDA), "scipy" (the slow reference), or None for the fastest.
    """

    linkage: str = "average"
    window: int | None = 64
    share_guidance: bool = True
    refresh_every: int = 3
    backend: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window is not None and not (isinstance(self.window, int) and self.window >= 2):
            raise ValueError(f"window must be None or a side of at least 2 tokens, got {self.window!r}")
        check_choices(self.linkage, backend=self.backend)

    @classmethod
    def paper(cls, r: float, linkage: str = "average") -> "ATCConfig":
        """The setting of the paper's Table 2, after the authors' code: hidden states, plain means, no weights.

        Every attention is clustered anew, and whole.
        """
        return cls(
            r=r,
            linkage=linkage,
            features="hidden_states",
            proportional_attention=False,
            window=None,
            share_guidance=False,
            refresh_every=1,
        )

    @classmethod
    def fast(cls, r: Share | Mapping[int, Share] = 0.1) -> "ATCConfig":
        """The quickest setting that stays near the unmerged pictures: all queries, few keys (eval/results)."""
        return cls(r=r, merge="keys_values", window=32)

    def merge_map(self, features: Tensor, grid: tuple[int, int], step: Tensor) -> MergeMap:
        num_clusters = self.num_clusters(features.shape[1])
        if self.window is None or self.window >= max(grid):
            return MergeMap(agglomerate(features, num_clusters, self.linkage, backend=self.backend), num_clusters)
        num_clusters = max(num_clusters, num_windows(*grid, self.window))
        labels = agglomerate_windows(features, num_clusters, *grid, self.window, self.linkage, self.backend)
        return MergeMap(labels, num_clusters)


@dataclass(frozen=True, kw_only=True)
class ToMeConfig(MergeConfig):
    """Token Merging for Stable Diffusion (Bolya & Hoffman 2023), the baseline; defaults as in their `tomesd`.

    Attributes:
        stride: side of the cells of which one token each may absorb others; no fewer than `1 / stride**2` of the
            tokens can be kept.
        seed: of the draw of those tokens, which is made anew at every timestep.
    """

    features: str = "hidden_states"
    proportional_attention: bool = False
    stride: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.stride, int) or self.stride < 1:
            raise ValueError(f"stride must be a whole number from 1 up, got {self.stride!r}")
        if isinstance(self.r, int | float) and self.r * self.stride**2 < 1:
            raise ValueError(
                f"ToMe with stride {self.stride} keeps at least {1 / self.stride**2:.4g} of the tokens, got r={self.r};"
                " use a larger r or stride, or ATCConfig"
            )

    def merge_map(self, features: Tensor, grid: tuple[int, int], step: Tensor) -> MergeMap:
        destinations = draw_destinations(*grid, self.stride, self.seed, step.to(features.device))
        num_clusters = max(self.num_clusters(features.shape[1]), len(destinations))
        return MergeMap(bipartite_labels(features, destinations, num_clusters), num_clusters)


def _check_share(r: object) -> None:
    """A function is asked at the beginning, in the middle and at the end."""
    for share in map(r, (0.0, 0.5, 1.0)) if callable(r) else [r]:
        _check_number(share)


def _check_number(r: object) -> None:
    if not isinstance(r, int | float) or not 0 < r <= 1 or r is True:
        hint = f"; did you mean {r / 100:g}?" if isinstance(r, int | float) and 1 < r <= 100 else ""
        raise ValueError(f"r is the share of tokens kept, in (0, 1], got {r!r}{hint}")
