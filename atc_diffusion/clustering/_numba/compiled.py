"""Compilation by Numba, and the nearest-neighbour search that all linkages share."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
from numba import njit

Array = np.ndarray[Any, np.dtype[Any]]

FAR = 3e38  # beyond every distance, finite in float32
LANES = 64  # independent comparisons, which LLVM turns into vector instructions

# NumPy's rule for division by zero: Python's raises, and the test for it keeps loops from becoming vector instructions.
inner = njit(nogil=True, error_model="numpy")


def entry(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile `function` at its first call, and cache it on disk if a cache directory is writable.

    Numba recompiles it when its own file changes, but not when the files of functions that it calls change.
    """
    dispatcher = inner(function)
    with suppress(RuntimeError):
        dispatcher.enable_caching()
    return dispatcher


@inner
def nearest(distances: Array, gone: Array, i: int, least: Array, apart: Array) -> int:
    """The nearest cluster that is not gone; of equally near ones, the one with the smallest i XOR j.

    XOR is symmetric, so equal tokens form pairs instead of all choosing the same one.

    Args:
        distances: `[N]`, from `i` to all clusters.
        gone: `[N]`, 0 or `FAR`.
        i: the cluster whose neighbour is searched.
        least: scratch space for `LANES` distances.
        apart: scratch space for `LANES` int32.
    """
    n = len(distances)
    least[:] = np.inf
    for start in range(0, n - n % LANES, LANES):
        for lane in range(LANES):
            distance, xor = distances[start + lane] + gone[start + lane], np.int32((start + lane) ^ i)
            nearer = (distance < least[lane]) | ((distance == least[lane]) & (xor < apart[lane]))
            least[lane] = distance if nearer else least[lane]
            apart[lane] = xor if nearer else apart[lane]
    for j in range(n - n % LANES, n):
        lane, distance, xor = j % LANES, distances[j] + gone[j], np.int32(j ^ i)
        if distance < least[lane] or (distance == least[lane] and xor < apart[lane]):
            least[lane], apart[lane] = distance, xor
    best = 0
    for lane in range(1, LANES):
        if least[lane] < least[best] or (least[lane] == least[best] and apart[lane] < apart[best]):
            best = lane
    return apart[best] ^ i
