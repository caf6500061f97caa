"""Tells when clustering is being compiled for the CPU: once for an installation, for some seconds."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from atc_diffusion.clustering._installed import numba_works


@contextmanager
def on_compilation(tell: Callable[[], object]) -> Iterator[None]:
    """Calls `tell` whenever a compilation begins in the `with` block; code compiled earlier is read from a cache."""
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
