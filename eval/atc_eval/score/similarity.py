"""Similarity of two images: PSNR, SSIM and LPIPS of 8-bit images `[H, W, 3]`."""

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

import atc_diffusion

Pixels = NDArray[np.uint8]
EQUAL = 10 * np.log10(12 * 255**2)  # 58.9 dB, the PSNR of rounding to 8 bits


def pixels(image: Image.Image) -> Pixels:
    return np.asarray(image.convert("RGB"))


def psnr(image: Pixels, other: Pixels) -> float:
    """Peak signal-to-noise ratio in dB; `EQUAL` if there is no difference, so that means stay finite."""
    found = atc_diffusion.psnr(image, other)
    return found if np.isfinite(found) else float(EQUAL)


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
