"""Which backend clusters, and on which device: tokens travel to the CPU where the compiled loops there are quicker.

Kernels that are new to a device cluster small problems beside the torch form before they are trusted there.
"""

import importlib.util
import platform
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

from atc_diffusion.clustering._clusters import MATRIX_FREE
from atc_diffusion.devices import without_autocast

HAS_TRITON = importlib.util.find_spec("triton") is not None
LARGEST_MATRIX = 4096  # tokens up to which the matrix-free linkages are quicker with the matrix
CPU = torch.device("cpu")

# Rounding decides between distances that nearly tie, and one such decision moves a handful of tokens.
FEW = 0.05

# Tokens that one Triton program clusters alone, and tokens of several tiles, which take launched rounds. They are
# multiples of 16, as those of images and windows are, so that Triton compiles the kernels that serve these.
CHECKED_SIZES = (240, 640)
CHECKED_CHANNELS = 64


def place(tokens: Tensor, linkage: str, metric: str, backend: str | None = None) -> tuple[str, torch.device]:
    """The backend that was asked for and the device that it needs, or the fastest, which never changes the result.

    Raises:
        RuntimeError: if Triton was asked for and fails on the tokens' device.
    """
    if backend is None:
        return _fastest(tokens, linkage, metric)
    if backend == "triton" and (problem := triton_problem(tokens.device, linkage, metric)):
        raise RuntimeError(f"{problem}; use backend='torch'")
    return backend, CPU if backend in ("numba", "scipy") else tokens.device


def _fastest(tokens: Tensor, linkage: str, metric: str) -> tuple[str, torch.device]:
    """Plain torch launches thousands of small kernels, so it clusters on a GPU only where there is nothing else."""
    if tokens.is_cuda and tokens.dtype != torch.float64:
        problem = triton_problem(tokens.device, linkage, metric)
        if problem is None:
            return "triton", tokens.device
        warn_once(f"{problem}; a slower backend clusters instead, and backend='numba' avoids this warning")
    matrix_free = (linkage, metric) in MATRIX_FREE and tokens.shape[1] > LARGEST_MATRIX
    if not matrix_free:
        if (problem := numba_problem()) is None:
            return "numba", CPU
        warn_once(f"{problem}; plain torch clusters instead, which takes longer; backend='torch' avoids this warning")
    return "torch", tokens.device if tokens.is_cuda else CPU


@cache
def numba_problem() -> str | None:
    """Why Numba cannot compile here; None if it can."""
    try:
        import numba
    except Exception as error:  # not installed, a NumPy newer than it supports, a library that does not load
        return f"Numba cannot be imported ({error})"
    return "Numba compiles nothing while NUMBA_DISABLE_JIT is set" if numba.config.DISABLE_JIT else None


@contextmanager
def on_compilation(tell: Callable[[], object]) -> Iterator[None]:
    """Call `tell` whenever clustering starts to be compiled for the CPU in the `with` block.

    This takes some seconds, once per installation; later runs read the compiled code from a cache on disk.
    """
    if numba_problem():
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


@cache
def warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=2)


@cache
def triton_problem(device: torch.device, linkage: str, metric: str) -> str | None:
    """Why the Triton kernels of a linkage cannot be trusted on `device`; None if they can."""
    if not HAS_TRITON:
        return "Triton is not installed (`pip install triton-windows` on Windows, `pip install triton` elsewhere)"
    try:
        wrong = [size for size in CHECKED_SIZES if _error(device, linkage, metric, size) > FEW]
        if not wrong:
            return None
        problem = f"other clusters of {' and '.join(map(str, wrong))} tokens"
    except Exception as error:  # whatever a compiler or driver raises
        problem = f"{type(error).__name__}: {error}"
    import triton

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    return (
        f"the Triton kernels for {linkage} linkage fail on {name} ({problem}); please report this, with torch"
        f" {torch.__version__}, Triton {triton.__version__} and Python {platform.python_version()}"
    )


def _error(device: torch.device, linkage: str, metric: str, num_tokens: int) -> float:
    """The fraction of random tokens that the Triton kernels give other company than the torch form does."""
    from atc_diffusion.clustering import _torch, _triton

    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(2, num_tokens, CHECKED_CHANNELS, generator=generator, dtype=torch.float32)
    problem, num_clusters = torch.cdist(tokens, tokens) if metric == "precomputed" else tokens, num_tokens // 3
    with without_autocast(device), without_autocast(CPU):
        labels = _triton.build_tree(problem.to(device), num_clusters, linkage, metric).cut(num_clusters)
        # In float64, since users may have products of float32 computed in less.
        expected = _torch.build_tree(problem.double(), num_clusters, linkage, metric).cut(num_clusters)
    return disagreement(labels.cpu(), expected)


def disagreement(labels: Tensor, expected: Tensor) -> float:
    """Fraction of the tokens that share their cluster with others in `labels` `[B, N]` than in `expected` `[B, N]`."""
    together, expected_together = (x[:, :, None] == x[:, None, :] for x in (labels, expected))
    return (together != expected_together).any(dim=2).float().mean().item()
