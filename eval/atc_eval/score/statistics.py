"""Distances between sets of images by their features (FID, KID, precision and recall), and intervals by bootstrap.

A 95 % interval is the value plus and minus 1.96 standard deviations over bootstrap draws of the images. All sets share
the draws, so intervals of differences are paired, and the bias that a bootstrap adds to FID cancels.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

Array = NDArray[np.float64]
Draws = NDArray[np.int64]


@dataclass(frozen=True)
class Estimate:
    """A value with half the width of its 95 % interval; f"{estimate:.1f}" is "30.0 ± 0.1"."""

    value: float
    margin: float

    @classmethod
    def of(cls, values: Array) -> "Estimate":
        """A value and its bootstrap replicates, `[1 + B]`."""
        return cls(float(values[0]), float(1.96 * values[1:].std(ddof=1)))

    @classmethod
    def of_mean(cls, values: Array, draws: Draws) -> "Estimate":
        """The mean of `values` `[n]`, one per image."""
        return cls.of(np.append(values.mean(), values[draws].mean(axis=1)))

    @property
    def star(self) -> str:
        """A star if zero lies outside the interval."""
        return " *" if abs(self.value) > self.margin else ""

    def __format__(self, spec: str) -> str:
        return f"{self.value:{spec}} ± {self.margin:{spec.lstrip('+')}}"


def bootstrap_draws(n: int, count: int) -> Draws:
    """Indices `[count, n]` of `n` images drawn with replacement; the same in every run."""
    return np.random.default_rng(0).integers(n, size=(count, n))


class FrechetDistance:
    """FID of sets to a reference of `m` images (Heusel et al. 2017, Eq. 6).

    For covariances `A'A` and `B'B`, the trace of the root of their product is the sum of the singular values of `AB'`.
    These take n real eigenvalues for n images, instead of C complex ones of a matrix `[C, C]`.
    """

    def __init__(self, reference: Tensor) -> None:
        features = reference.double().numpy()
        self.mean = features.mean(axis=0)
        self.covariance = np.cov(features, rowvar=False)

    def __call__(self, features: Tensor, draws: Draws) -> Array:
        """FID `[B]` of the sets that `draws` `[B, n]` pick from `features` `[n, C]`."""
        x = features.double().numpy() - self.mean
        gram, inner = x @ self.covariance @ x.T, x @ x.T
        return np.array([self._distance(gram, inner, draw) for draw in draws])

    def _distance(self, gram: Array, inner: Array, draw: NDArray[np.int64]) -> float:
        n = len(draw)
        images, counts = np.unique(draw, return_counts=True)
        mean_square = counts @ inner[np.ix_(images, images)] @ counts / n**2
        variance = (counts @ inner.diagonal()[images] - n * mean_square) / (n - 1)
        roots = np.sqrt(np.linalg.eigvalsh(_centred(gram, images, counts)).clip(min=0))
        return float(mean_square + variance + self.covariance.trace() - 2 * roots.sum() / np.sqrt(n - 1))


def _centred(gram: Array, images: NDArray[np.int64], counts: NDArray[np.int64]) -> Array:
    """Inner products of the drawn images about their mean, each weighted by how often it was drawn."""
    inner = gram[np.ix_(images, images)]
    to_mean = inner @ counts / counts.sum()
    centred = inner - to_mean - to_mean[:, None] + to_mean @ counts / counts.sum()
    weights = np.sqrt(counts)
    return centred * weights * weights[:, None]


def kernel_distance(features: Tensor, reference: Tensor) -> tuple[float, float]:
    """KID (Binkowski et al. 2018) of `[n, C]` to `[m, C]`: mean and deviation over 100 subsets, by torch-fidelity."""
    size = min(1000, len(features) // 2, len(reference) // 2)
    metric = kid_features_to_metric(features, reference, kid_subset_size=size, verbose=False)
    return metric["kernel_inception_distance_mean"], metric["kernel_inception_distance_std"]


def precision_recall(features: Tensor, reference: Tensor) -> tuple[float, float]:
    """Precision and recall (Kynkaanniemi et al. 2019, k=3) of `[n, C]` against `[m, C]`, by torch-fidelity."""
    metric = prc_features_to_metric(features, reference, verbose=False)
    return metric["precision"], metric["recall"]
