"""Similarity of images."""

import numpy as np
from numpy.typing import ArrayLike, NDArray


def psnr(image: ArrayLike, other: ArrayLike) -> float:
    """Peak signal-to-noise ratio in dB of 8-bit images `[..., H, W, 3]`, by the mean over all pixels.

    Infinite if they are equal; unrelated images are at about 10 dB.

    Raises:
        ValueError: if the shapes differ, or a value is no whole number from 0 to 255.
    """
    one, two = _pair(image, other)
    error = np.square(one - two).mean()
    return float(10 * np.log10(255**2 / error)) if error else float("inf")


def ssim(image: ArrayLike, other: ArrayLike) -> float:
    """Structural similarity of 8-bit images `[H, W, 3]`, with the Gaussian window of Wang et al. 2004; 1 if equal.

    Needs scikit-image.

    Raises:
        ValueError: if the shapes differ, or a value is no whole number from 0 to 255.
    """
    from skimage.metrics import structural_similarity

    wang = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    return float(structural_similarity(*_pair(image, other), channel_axis=2, data_range=255, **wang))


def _pair(image: ArrayLike, other: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    one, two = np.asarray(image, np.float64), np.asarray(other, np.float64)
    if one.shape != two.shape:
        raise ValueError(f"images must have one shape, got {list(one.shape)} and {list(two.shape)}")
    for pixels in (one, two):
        if not np.array_equal(pixels, pixels.round().clip(0, 255)):
            raise ValueError(
                f"images must have 8 bits, whole numbers from 0 to 255, got {pixels.min():g} to {pixels.max():g}; of"
                " images from 0 to 1, pass (image * 255).round()"
            )
    return one, two
