"""Configurations of other ways of clustering, to compare with."""

from dataclasses import dataclass

from atc_diffusion.config import Features, MergeConfig, check_count


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

    def _check_number(self, name: str, share: object, progress: float | None) -> float:
        number = super()._check_number(name, share, progress)
        if number * self.stride**2 < 1:
            raise ValueError(
                f"ToMe with stride {self.stride} keeps at least {1 / self.stride**2:.4g} of the tokens, got {name}="
                f"{number}; use a larger {name} or stride, or ATCConfig"
            )
        return number


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
