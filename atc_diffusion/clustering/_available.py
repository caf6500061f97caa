"""Which compilers can be used, and when Numba is at work."""

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

HAS_TRITON = importlib.util.find_spec("triton") is not None


@cache
def numba_problem() -> str | None:
    """Why Numba cannot compile here; None if it can."""
    try:
        import numba
    except Exception as error:  # not installed, a NumPy newer than it supports, a library that does not load
        return f"Numba cannot be imported ({error})"
    return "Numba compiles nothing while NUMBA_DISABLE_JIT is set" if numba.config.DISABLE_JIT else None


def numba_works() -> bool:
    return numba_problem() is None


@contextmanager
def on_compilation(tell: Callable[[], object]) -> Iterator[None]:
    """Call `tell` whenever clustering starts to be compiled for the CPU in the `with` block.

    This takes some seconds, once per installation; later runs read the compiled code from a cache on disk.
    """
    if not numba_works():
        yield
        return
    from numba.core import event

    class Listener(event.Listener):  # type: ignore[misc]  # Numba is not annotated
        def on_start(self, event: Any) -> None:
            tell()

        def on_end(self, event: Any) -> None:
            pass

    with event.install_listener("numba:compile", Listener()):
        yield
