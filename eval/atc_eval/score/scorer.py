"""All scores of a set of images: distances to the reference, and fidelity to the unmerged images."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
from torch import Tensor

from atc_diffusion import ssim
from atc_eval.draw.image_set import ImageSet
from atc_eval.draw.images import PlannedImage
from atc_eval.score.bootstrap import Array, Estimate, bootstrap_draws
from atc_eval.score.distances import FrechetDistance, kernel_distance, precision_recall
from atc_eval.score.image_features import Features
from atc_eval.score.similarity import Lpips, pixels, psnr


@dataclass(frozen=True)
class Fidelity:
    """Closeness of a set to the unmerged images of the same seeds; `psnr_of_each` is `[n]`."""

    fid_change: Estimate
    psnr: Estimate
    ssim: Estimate
    lpips: Estimate | None
    feature_distance: Estimate
    psnr_of_each: Array


@dataclass(frozen=True)
class Scores:
    """All scores of one set of n images; `fidelity` is None for the unmerged set itself."""

    n: int
    fid: Estimate
    kid: float
    kid_deviation: float
    precision: float
    recall: float
    fidelity: Fidelity | None


class Scorer:
    """Scores sets of the same images against a reference set and against the unmerged set.

    Args:
        features: the features to score by.
        reference: features of the reference images, `[m, C]`.
        unmerged: the images of the unmerged model.
        bootstrap: number of bootstrap draws.
        lpips: measures LPIPS; None: LPIPS is left out.
    """

    def __init__(
        self, features: Features, reference: Tensor, unmerged: ImageSet, bootstrap: int, lpips: Lpips | None = None
    ) -> None:
        self.lpips = lpips
        self.features = features
        self.reference = reference
        self.unmerged = unmerged
        self.unmerged_features = features(unmerged.paths)
        self.draws = bootstrap_draws(len(unmerged.images), bootstrap)
        self.distance = FrechetDistance(self.reference)
        self.unmerged_fid = self._fid(self.unmerged_features)

    def __call__(self, images: ImageSet) -> Scores:
        """Scores of a complete set."""
        features = self.features(images.paths)
        fid = self._fid(features)
        kid, kid_deviation = kernel_distance(features, self.reference)
        precision, recall = precision_recall(features, self.reference)
        fidelity = None if images is self.unmerged else self._fidelity(images, features, fid)
        return Scores(len(features), self._estimate(fid), kid, kid_deviation, precision, recall, fidelity)

    def _fid(self, features: Tensor) -> Array:
        """FID and its replicates, `[1 + B]`."""
        return self.distance(features, np.vstack([np.arange(len(features)), self.draws]))

    def _estimate(self, values: Array) -> Estimate:
        return Estimate.of(values[0], values[1:])

    def _fidelity(self, images: ImageSet, features: Tensor, fid: Array) -> Fidelity:
        with ThreadPoolExecutor() as threads:
            similarity = np.array(list(threads.map(partial(self._similarity, images), images.images)))
        distances = (features.double() - self.unmerged_features.double()).norm(dim=1).numpy()
        return Fidelity(
            fid_change=self._estimate(fid - self.unmerged_fid),
            psnr=Estimate.of_mean(similarity[:, 0], self.draws),
            ssim=Estimate.of_mean(similarity[:, 1], self.draws),
            lpips=Estimate.of_mean(similarity[:, 2], self.draws) if self.lpips else None,
            feature_distance=Estimate.of_mean(distances, self.draws),
            psnr_of_each=similarity[:, 0],
        )

    def _similarity(self, images: ImageSet, image: PlannedImage) -> tuple[float, float, float]:
        """PSNR, SSIM and LPIPS (NaN if left out) of one image to the unmerged one."""
        pair = pixels(images.load(image)), pixels(self.unmerged.load(image))
        return psnr(*pair), ssim(*pair), self.lpips(*pair) if self.lpips else float("nan")
