"""All scores of a set of pictures: distances to the reference, and fidelity to the unmerged pictures."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
from torch import Tensor

from draw.picture_set import PictureSet
from draw.pictures import Picture
from score.bootstrap import Array, Estimate, bootstrap_draws
from score.features import Features
from score.fid import FrechetDistance, kernel_distance, precision_recall
from score.nearness import Lpips, pixels, psnr, ssim


@dataclass(frozen=True)
class Fidelity:
    """Closeness of a set to the unmerged pictures of the same seeds; `psnr_of_each` is `[n]`."""

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
        reference: features of the reference pictures, `[m, C]`.
        unmerged: the pictures of the unmerged model.
        bootstrap: number of bootstrap draws.
        lpips: measures LPIPS; None: LPIPS is left out.
    """

    def __init__(
        self, features: Features, reference: Tensor, unmerged: PictureSet, bootstrap: int, lpips: Lpips | None = None
    ) -> None:
        self.lpips = lpips
        self.features = features
        self.reference = reference
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
        """PSNR, SSIM and LPIPS (NaN if left out) of one picture to the unmerged one."""
        pair = pixels(pictures.load(picture)), pixels(self.unmerged.load(picture))
        return psnr(*pair), ssim(*pair), self.lpips(*pair) if self.lpips else float("nan")
