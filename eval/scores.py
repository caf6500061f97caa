"""Scores of a set of pictures: distances to a reference set, and fidelity to the pictures of the unmerged model.

Every 95 % interval is the value plus and minus 1.96 standard deviations over bootstrap draws of the pictures. All sets
share the draws, so the interval of a difference is paired, and the bias that a bootstrap adds to FID cancels.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from features import Features
from numpy.typing import NDArray
from pictures import Picture, PictureSet
from PIL import Image
from skimage.metrics import structural_similarity
from torch import Tensor
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

Array = NDArray[np.float64]
Draws = NDArray[np.int64]

# Rounding to whole levels alone has this mean square; nearer than that is as near as 8 bits can tell.
ROUNDING_ERROR = 1 / 12


@dataclass(frozen=True)
class Estimate:
    """A value with half the width of its 95 % interval."""

    value: float
    margin: float

    @classmethod
    def of(cls, value: float, replicates: Array) -> "Estimate":
        """`value`, whose bootstrap replicates are `[B]`."""
        return cls(float(value), float(1.96 * replicates.std(ddof=1)))

    @classmethod
    def of_mean(cls, values: Array, draws: Draws) -> "Estimate":
        """The mean of one value for every picture `[n]`."""
        return cls.of(values.mean(), values[draws].mean(axis=1))

    @property
    def differs(self) -> bool:
        """Whether zero lies outside the interval."""
        return abs(self.value) > self.margin


def bootstrap_draws(n: int, count: int) -> Draws:
    """Indices `[count, n]` of `n` pictures drawn with replacement, the same in every run."""
    return np.random.default_rng(0).integers(n, size=(count, n))


class FrechetDistance:
    """FID of sets to a reference of `m` pictures (Heusel et al. 2017, Eq. 6).

    The trace of the root of the product of two covariances `A'A` and `B'B` is the sum of the singular values of `AB'`:
    with n pictures, n eigenvalues instead of the C complex ones of a product of covariances `[C, C]`.
    """

    def __init__(self, reference: Tensor) -> None:
        features = reference.double().numpy()
        self.mean = features.mean(axis=0)
        self.covariance = np.cov(features, rowvar=False)

    def __call__(self, features: Tensor, draws: Draws) -> Array:
        """FID `[B]` of the sets that `draws` `[B, n]` picks from `features` `[n, C]`."""
        x = features.double().numpy() - self.mean
        gram, inner = x @ self.covariance @ x.T, x @ x.T
        return np.array([self._distance(gram, inner, draw) for draw in draws])

    def _distance(self, gram: Array, inner: Array, draw: NDArray[np.int64]) -> float:
        n = len(draw)
        pictures, counts = np.unique(draw, return_counts=True)
        mean_square = counts @ inner[np.ix_(pictures, pictures)] @ counts / n**2
        variance = (counts @ inner.diagonal()[pictures] - n * mean_square) / (n - 1)
        roots = np.sqrt(np.linalg.eigvalsh(_centred(gram, pictures, counts)).clip(min=0))
        return float(mean_square + variance + self.covariance.trace() - 2 * roots.sum() / np.sqrt(n - 1))


def _centred(gram: Array, pictures: NDArray[np.int64], counts: NDArray[np.int64]) -> Array:
    """The inner products of the pictures drawn, about their mean, each as often as it was drawn."""
    inner = gram[np.ix_(pictures, pictures)]
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


def psnr(image: Array, other: Array) -> float:
    """Peak signal-to-noise ratio in dB of two pictures `[H, W, 3]` in 0..255; at most 58.9, the rounding error's."""
    error = max(float(np.square(image - other).mean()), ROUNDING_ERROR)
    return float(10 * np.log10(255**2 / error))


def ssim(image: Array, other: Array) -> float:
    """Structural similarity of two pictures `[H, W, 3]` in 0..255 with the Gaussian window of Wang et al. 2004."""
    return float(
        structural_similarity(
            image,
            other,
            data_range=255,
            channel_axis=2,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
    )


class Lpips:
    """LPIPS (Zhang et al. 2018) by its authors' package, with AlexNet.

    Raises:
        ValueError: if AlexNet's weights cannot be downloaded.
    """

    def __init__(self) -> None:
        import lpips

        try:
            self.network = lpips.LPIPS(net="alex", verbose=False)
        except OSError as error:
            raise ValueError(
                f"--lpips needs AlexNet's weights, which cannot be downloaded ({error}); leave it out"
            ) from error

    def __call__(self, image: Array, other: Array) -> float:
        """The distance of two pictures `[H, W, 3]` in 0..255."""
        pair = [torch.from_numpy(each).float().movedim(2, 0)[None] / 127.5 - 1 for each in (image, other)]
        with torch.inference_mode():
            return float(self.network(*pair))


@dataclass(frozen=True)
class Fidelity:
    """How near a set is to the unmerged pictures of the same seeds; `psnr_of_each` is `[n]`."""

    fid_change: Estimate
    psnr: Estimate
    ssim: Estimate
    lpips: Estimate | None
    feature_distance: Estimate
    psnr_of_each: Array


@dataclass(frozen=True)
class Scores:
    """All scores of one set of n pictures; `fidelity` is None for the unmerged set itself."""

    n: int
    fid: Estimate
    kid: float
    kid_deviation: float
    precision: float
    recall: float
    fidelity: Fidelity | None


class Scorer:
    """Scores sets of the same pictures against a reference set and against the unmerged set.

    Args:
        features: the features to score by.
        reference: paths of the reference pictures.
        unmerged: the pictures of the unmerged model.
        bootstrap: number of bootstrap draws.
        lpips: measures LPIPS; None: not measured.
    """

    def __init__(
        self,
        features: Features,
        reference: Sequence[Path],
        unmerged: PictureSet,
        bootstrap: int,
        lpips: Lpips | None = None,
    ) -> None:
        self.lpips = lpips
        self.features = features
        self.reference = features(reference)
        self.unmerged = unmerged
        self.unmerged_features = features(unmerged.paths)
        self.draws = bootstrap_draws(len(unmerged.pictures), bootstrap)
        self.distance = FrechetDistance(self.reference)
        self.unmerged_fid = self._fid(self.unmerged_features)

    def __call__(self, pictures: PictureSet) -> Scores:
        """Scores of a complete set."""
        features = self.features(pictures.paths)
        fid = self._fid(features)
        kid, kid_deviation = kernel_distance(features, self.reference)
        precision, recall = precision_recall(features, self.reference)
        fidelity = None if pictures is self.unmerged else self._fidelity(pictures, features, fid)
        return Scores(len(features), self._estimate(fid), kid, kid_deviation, precision, recall, fidelity)

    def _fid(self, features: Tensor) -> Array:
        """FID and its replicates, `[1 + B]`."""
        return self.distance(features, np.vstack([np.arange(len(features)), self.draws]))

    def _estimate(self, values: Array) -> Estimate:
        return Estimate.of(values[0], values[1:])

    def _fidelity(self, pictures: PictureSet, features: Tensor, fid: Array) -> Fidelity:
        with ThreadPoolExecutor() as threads:
            nearness = np.array(list(threads.map(partial(self._nearness, pictures), pictures.pictures)))
        distances = (features.double() - self.unmerged_features.double()).norm(dim=1).numpy()
        return Fidelity(
            fid_change=self._estimate(fid - self.unmerged_fid),
            psnr=Estimate.of_mean(nearness[:, 0], self.draws),
            ssim=Estimate.of_mean(nearness[:, 1], self.draws),
            lpips=Estimate.of_mean(nearness[:, 2], self.draws) if self.lpips else None,
            feature_distance=Estimate.of_mean(distances, self.draws),
            psnr_of_each=nearness[:, 0],
        )

    def _nearness(self, pictures: PictureSet, picture: Picture) -> tuple[float, float, float]:
        """PSNR, SSIM and LPIPS (NaN if not measured) of one picture to the unmerged one."""
        pair = _array(pictures.load(picture)), _array(self.unmerged.load(picture))
        return psnr(*pair), ssim(*pair), self.lpips(*pair) if self.lpips else float("nan")


def _array(image: Image.Image) -> Array:
    return np.asarray(image, np.float64)
