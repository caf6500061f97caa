"""Which compilers are installed."""

import importlib.util
from functools import cache

HAS_NUMBA, HAS_TRITON = (importlib.util.find_spec(name) is not None for name in ("numba", "triton"))


@cache
def numba_works() -> bool:
    """Whether Numba can be imported; it refuses a NumPy that is newer than it supports."""
    try:
        import numba  # noqa: F401
    except ImportError:
        return False
    return True
