"""Compilation by Numba, and the nearest-neighbour search that all linkages share."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
from numba import njit
from numba.core.caching import FunctionCache

Array = np.ndarray[Any, np.dtype[Any]]

UNREACHABLE = 3e38  # beyond every distance, and finite in float32, so that a distance can be added to it
LANES = 64  # independent comparisons, which LLVM turns into vector instructions

# NumPy's rule for division by zero: Python's raises, and the test for it keeps loops from becoming vector instructions.
inner = njit(nogil=True, error_model="numpy")


def entry(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile `function` at its first call, and cache it on disk where that is possible.

    Numba recompiles it when its own file changes, but not when the files of functions that it calls change.
    """
    dispatcher = inner(function)
    with suppress(RuntimeError, OSError):  # no directory is writable
        dispatcher._cache = _Cache(function)
    return dispatcher


class _Cache(FunctionCache):  # type: ignore[misc]  # Numba is not annotated
    """A cache that cannot end a call: what it cannot read is compiled, and what it cannot write is not kept."""

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(sig, target_context)
        except Exception:  # whatever damaged files make Numba and pickle raise
            with suppress(OSError):
                self.flush()  # or saving would read the damaged index again
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        with suppress(OSError):  # a full disk, an exceeded quota, a directory that became read-only
            super().save_overload(sig, data)


@inner
def nearest(distances: Array, gone: Array, i: int, least: Array, apart: Array) -> int:
    """The nearest cluster that is not gone; of equally near ones, the one with the smallest i XOR j.

    XOR is symmetric, so equal tokens form pairs instead of all choosing the same one.

    Args:
        distances: `[N]`, from `i` to all clusters.
        gone: `[N]`, 0 or `UNREACHABLE`.
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
