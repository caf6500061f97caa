"""95 % intervals by bootstrap.

An interval is the value plus and minus 1.96 standard deviations over bootstrap draws of the images. All sets share
the draws, so intervals of differences are paired, and the bias that a bootstrap adds to FID cancels.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Draws = NDArray[np.int64]


@dataclass(frozen=True)
class Estimate:
    """A value with half the width of its 95 % interval; f"{estimate:.1f}" is "30.0 ± 0.1"."""

    value: float
    margin: float

    @classmethod
    def of(cls, value: float, replicates: Array) -> "Estimate":
        """`value` with its bootstrap replicates `[B]`."""
        return cls(float(value), float(1.96 * replicates.std(ddof=1)))

    @classmethod
    def of_mean(cls, values: Array, draws: Draws) -> "Estimate":
        """The mean of `values` `[n]`, one per image."""
        return cls.of(values.mean(), values[draws].mean(axis=1))

    @property
    def differs(self) -> bool:
        """Whether zero lies outside the interval."""
        return abs(self.value) > self.margin

    @property
    def star(self) -> str:
        return " *" if self.differs else ""

    def __format__(self, spec: str) -> str:
        return f"{self.value:{spec}} ± {self.margin:{spec.lstrip('+')}}"


def bootstrap_draws(n: int, count: int) -> Draws:
    """Indices `[count, n]` of `n` images drawn with replacement; the same in every run."""
    return np.random.default_rng(0).integers(n, size=(count, n))
