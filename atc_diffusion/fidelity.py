"""Similarity of images."""

from typing import TYPE_CHECKING, Any, TypeAlias, Union

import numpy as np
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    from PIL.Image import Image

Pixels: TypeAlias = Union[ArrayLike, "Image"]


def psnr(image: Pixels, other: Pixels) -> float:
    """Peak signal-to-noise ratio in dB of 8-bit images `[..., H, W, 3]`, by the mean over all pixels.

    Infinite if they are equal; unrelated images are at about 10 dB.

    Raises:
        ValueError: if the shapes differ or are others, or a value is no whole number from 0 to 255.
    """
    one, two = _pair(image, other)
    error = np.square(one - two).mean()
    return float(10 * np.log10(255**2 / error)) if error else float("inf")


def ssim(image: Pixels, other: Pixels) -> float:
    """Structural similarity of 8-bit images `[H, W, 3]`, with the Gaussian window of Wang et al. 2004; 1 if equal.

    Needs scikit-image.

    Raises:
        ValueError: as `psnr`, or if a side is shorter than the window of 11 pixels.
    """
    from skimage.metrics import structural_similarity

    wang = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    one, two = _pair(image, other)
    if one.ndim != 3 or min(one.shape[:2]) < 11:
        raise ValueError(f"ssim compares two images [H, W, 3] of at least 11 x 11 pixels, got {list(one.shape)}")
    return float(structural_similarity(one, two, channel_axis=2, data_range=255, **wang))


def _pair(image: Pixels, other: Pixels) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    one, two = _pixels(image), _pixels(other)
    if one.shape != two.shape:
        raise ValueError(f"images must have one shape, got {list(one.shape)} and {list(two.shape)}")
    if one.ndim < 3 or one.shape[-1] != 3 or not one.size:
        raise ValueError(f"images must be [..., H, W, 3], got {list(one.shape)}")
    for pixels in (one, two):
        if not np.array_equal(pixels, pixels.round().clip(0, 255)):
            raise ValueError(
                f"images must have 8 bits, whole numbers from 0 to 255, got {pixels.min():g} to {pixels.max():g}; of"
                " images from 0 to 1, pass (image * 255).round()"
            )
    return one, two


def _pixels(image: Any) -> NDArray[np.float64]:
    if hasattr(image, "convert"):  # PIL's may have a palette, or other channels
        image = image.convert("RGB")
    return np.asarray(image.detach().float().cpu() if hasattr(image, "detach") else image, np.float64)
