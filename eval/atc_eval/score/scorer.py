"""Scores of a set of images: distances to the reference, and fidelity to the unmerged images."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor
from transformers.hf_argparser import HfArg

import atc_diffusion
from atc_diffusion import ssim
from atc_diffusion.commands import check_number
from atc_eval.command_line import check_exists
from atc_eval.draw.images import PlannedImage
from atc_eval.draw.sets import ImageSet
from atc_eval.files import FEWEST_IMAGES, list_images
from atc_eval.score.features import Features
from atc_eval.score.statistics import Estimate, FrechetDistance, bootstrap_draws, kernel_distance, precision_recall

EQUAL = 10 * np.log10(12 * 255**2)  # 58.9 dB, the PSNR of rounding to 8 bits


def psnr(image: Image.Image | ArrayLike, other: Image.Image | ArrayLike) -> float:
    """Peak signal-to-noise ratio in dB; `EQUAL` if there is no difference, so that means stay finite."""
    found = atc_diffusion.psnr(image, other)
    return found if np.isfinite(found) else float(EQUAL)


class Lpips:
    """LPIPS (Zhang et al. 2018) by its authors' package, with AlexNet."""

    def __init__(self) -> None:
        import lpips

        try:
            self.network = lpips.LPIPS(net="alex", verbose=False)
        except OSError as error:
            raise ValueError(
                f"--lpips needs AlexNet's weights, which cannot be downloaded ({error}); leave it out"
            ) from error

    def __call__(self, image: Image.Image, other: Image.Image) -> float:
        pair = [pil_to_tensor(each)[None] / 127.5 - 1 for each in (image, other)]
        with torch.inference_mode():
            return float(self.network(*pair))


@dataclass(frozen=True)
class Fidelity:
    """Closeness of a set to the unmerged images of the same seeds; `psnr_of_each` is `[n]`."""

    fid_change: Estimate
    psnr: Estimate
    ssim: Estimate
    lpips: Estimate | None
    feature_distance: Estimate
    psnr_of_each: NDArray[np.float64]


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


@dataclass(eq=False)
class Scorer:
    """Scores sets of the same images against a reference set and against the unmerged set."""

    features: Features
    reference: Tensor  # features of the reference images, [m, C]
    unmerged: ImageSet
    bootstrap: int  # number of draws
    lpips: Lpips | None  # None: LPIPS is left out

    def __post_init__(self) -> None:
        self.unmerged_features = self.features(self.unmerged.paths)
        self.draws = bootstrap_draws(len(self.unmerged.images), self.bootstrap)
        self.distance = FrechetDistance(self.reference)
        self.unmerged_fid = self._fid(self.unmerged_features)

    def __call__(self, images: ImageSet) -> Scores:
        """Scores of a complete set."""
        features = self.features(images.paths)
        fid = self._fid(features)
        kid, kid_deviation = kernel_distance(features, self.reference)
        precision, recall = precision_recall(features, self.reference)
        fidelity = None if images is self.unmerged else self._fidelity(images, features, fid)
        return Scores(len(features), Estimate.of(fid), kid, kid_deviation, precision, recall, fidelity)

    def _fid(self, features: Tensor) -> NDArray[np.float64]:
        """FID and its replicates, `[1 + B]`."""
        return self.distance(features, np.vstack([np.arange(len(features)), self.draws]))

    def _fidelity(self, images: ImageSet, features: Tensor, fid: NDArray[np.float64]) -> Fidelity:
        with ThreadPoolExecutor() as threads:
            similarity = np.array(list(threads.map(partial(self._similarity, images), images.images)))
        distances = (features.double() - self.unmerged_features.double()).norm(dim=1).numpy()
        return Fidelity(
            fid_change=Estimate.of(fid - self.unmerged_fid),
            psnr=Estimate.of_mean(similarity[:, 0], self.draws),
            ssim=Estimate.of_mean(similarity[:, 1], self.draws),
            lpips=Estimate.of_mean(similarity[:, 2], self.draws) if self.lpips else None,
            feature_distance=Estimate.of_mean(distances, self.draws),
            psnr_of_each=similarity[:, 0],
        )

    def _similarity(self, images: ImageSet, image: PlannedImage) -> tuple[float, float, float]:
        """PSNR, SSIM and LPIPS (NaN if left out) of one image to the unmerged one."""
        pair = images.load(image), self.unmerged.load(image)
        return psnr(*pair), ssim(*pair), self.lpips(*pair) if self.lpips else float("nan")


@dataclass(frozen=True)
class Scoring:
    """How images are scored."""

    _argument_group_name = "scoring"
    reference: Path | None = HfArg(default=None, help="folder of reference images; eval/reference.py makes the paper's")
    features: Literal["inception", "efficientnet-lite0"] = HfArg(default="inception", help="network of the features")
    inception_weights: Path | None = HfArg(default=None, help="torch-fidelity's weights (default: downloaded)")
    resize: Literal["clean", "tensorflow"] = HfArg(
        default="clean", help="clean: as in clean-fid and the paper; tensorflow: as for the original FID"
    )
    bootstrap: int = HfArg(default=200, help="bootstrap draws for the intervals")
    lpips: bool = HfArg(default=False, help="LPIPS too, with AlexNet's weights, which are downloaded")

    def __post_init__(self) -> None:
        check_exists("--reference", self.reference, "folder")
        check_exists("--inception-weights", self.inception_weights, "file")
        check_number("--bootstrap", self.bootstrap, least=2)
        if self.reference and (count := len(list_images(self.reference))) < FEWEST_IMAGES:
            raise ValueError(f"--reference {self.reference} needs at least {FEWEST_IMAGES} images, and has {count}")

    def prepare(self, cache: Path, device: torch.device) -> Callable[[ImageSet], Scorer]:
        """A function that makes the scorer from the unmerged set; everything else is loaded now."""
        if self.reference is None:
            raise ValueError("--reference DIR is needed; eval/reference.py makes it from ImageNet; or try --demo")
        features = Features(self.features, self.resize, cache, device, self.inception_weights)
        lpips = Lpips() if self.lpips else None
        return partial(Scorer, features, features(list_images(self.reference)), bootstrap=self.bootstrap, lpips=lpips)
