"""How functions are compiled, and the search that all linkages share."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
from numba import njit

Array = np.ndarray[Any, np.dtype[Any]]

FAR = 3e38  # beyond every distance, finite in float32
LANES = 64  # places that are compared side by side: LLVM makes vector instructions of them

# NumPy's rule for division by zero: Python's raises, and the test for it keeps loops from becoming vector instructions.
inner = njit(nogil=True, error_model="numpy")


def entry(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled at its first call, and kept on disk if any directory for that is writable.

    What is kept is compiled anew after a change of the file that the entry stands in, not of others that it calls.
    """
    dispatcher = inner(function)
    with suppress(RuntimeError):
        dispatcher.enable_caching()
    return dispatcher


@inner
def nearest(distances: Array, gone: Array, i: int, least: Array, apart: Array) -> int:
    """Of the nearest that are not gone, the one of the smallest i XOR j.

    Being symmetric, that pairs equal tokens off instead of sending all of them to one.

    Args:
        distances: `[N]`, from `i` to all.
        gone: `[N]`, 0 or `FAR`.
        i: whose neighbour is looked for.
        least: room for `LANES` distances.
        apart: room for `LANES` int32.
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
