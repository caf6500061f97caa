"""Which compilers are there."""

import importlib.util
from functools import cache

HAS_NUMBA, HAS_TRITON = (importlib.util.find_spec(name) is not None for name in ("numba", "triton"))


@cache
def numba_works() -> bool:
    """Numba refuses to be imported beside a NumPy that is newer than it knows."""
    try:
        import numba  # noqa: F401
    except ImportError:
        return False
    return True
