"""95 % intervals by bootstrap.

Every interval is the value plus and minus 1.96 standard deviations over bootstrap draws of the pictures. All sets share
the draws, so the interval of a difference is paired, and the bias that a bootstrap adds to FID cancels.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Draws = NDArray[np.int64]


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
