"""Similarity of images."""

import numpy as np
from numpy.typing import ArrayLike


def psnr(image: ArrayLike, other: ArrayLike) -> float:
    """Peak signal-to-noise ratio in dB of 8-bit images of equal shape, `[..., H, W, 3]`, by the mean over all pixels.

    Infinite if they are equal; two unrelated images are at about 10 dB.
    """
    error = np.square(np.asarray(image, np.float64) - np.asarray(other, np.float64)).mean()
    return float(10 * np.log10(255**2 / error)) if error else float("inf")
