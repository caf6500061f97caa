"""Which backend clusters, and on which device: tokens travel to the CPU where the compiled loops there are quicker."""

import warnings
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from atc_diffusion.clustering._installed import HAS_TRITON, numba_works

MATRIX_FREE = (("average", "cosine"), ("ward", "euclidean"))  # clustered from means, without an N x N matrix
LARGEST_MATRIX = 4096  # tokens up to which these are quicker with the matrix
CPU = torch.device("cpu")


class Place(NamedTuple):
    """Where tokens are clustered, and by what."""

    backend: str
    device: torch.device


def place(tokens: Tensor, linkage: str, metric: str, backend: str | None = None) -> Place:
    """The backend that was asked for, on the device that it needs, or the fastest, which never changes the result.

    Raises:
        RuntimeError: if Triton was asked for and fails on the tokens' device.
    """
    if backend is None:
        return _fastest(tokens, linkage, metric)
    if backend == "triton":
        from atc_diffusion.clustering._self_check import require_triton

        require_triton(tokens.device, linkage, metric)
    return Place(backend, CPU if backend in ("numba", "scipy") else tokens.device)


def _fastest(tokens: Tensor, linkage: str, metric: str) -> Place:
    """Plain torch launches thousands of small kernels, so it clusters on a GPU only where there is nothing else."""
    if tokens.is_cuda and tokens.dtype != torch.float64 and _has_kernels(tokens.device, linkage, metric):
        return Place("triton", tokens.device)
    matrix_free = (linkage, metric) in MATRIX_FREE and tokens.shape[1] > LARGEST_MATRIX
    if numba_works() and not matrix_free:
        return Place("numba", CPU)
    return Place("torch", tokens.device if tokens.is_cuda else CPU)


def _has_kernels(device: torch.device, linkage: str, metric: str) -> bool:
    """Whether Triton's kernels of a linkage are there and right on `device`."""
    if not HAS_TRITON:
        _warn_of_no_triton()
        return False
    from atc_diffusion.clustering._self_check import triton_works

    return triton_works(device, linkage, metric)


@cache
def _warn_of_no_triton() -> None:
    warnings.warn(
        "Triton is not installed, so tokens on the GPU are clustered on the CPU, which takes longer; run"
        " `pip install triton-windows` on Windows, `pip install triton` elsewhere",
        stacklevel=2,
    )
