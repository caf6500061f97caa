"""Similarity of two pictures: PSNR, SSIM and LPIPS of 8-bit pictures `[H, W, 3]`."""

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from skimage.metrics import structural_similarity

from atc_diffusion import fidelity

Pixels = NDArray[np.uint8]
ROUNDING = 10 * np.log10(12 * 255**2)  # 58.9 dB, the PSNR of rounding to 8 bits; closer pictures cannot be told apart


def pixels(image: Image.Image) -> Pixels:
    return np.asarray(image.convert("RGB"))


def psnr(image: Pixels, other: Pixels) -> float:
    """Peak signal-to-noise ratio in dB, at most `ROUNDING`."""
    return min(fidelity.psnr(image, other), ROUNDING)


def ssim(image: Pixels, other: Pixels) -> float:
    """Structural similarity with the Gaussian window of Wang et al. 2004."""
    wang = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    return float(structural_similarity(image, other, channel_axis=2, data_range=255, **wang))


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

    def __call__(self, image: Pixels, other: Pixels) -> float:
        pair = [torch.from_numpy(each).float().movedim(2, 0)[None] / 127.5 - 1 for each in (image, other)]
        with torch.inference_mode():
            return float(self.network(*pair))
