"""Kernels that are new to a device cluster small problems beside the torch form before they are trusted there.

Only the kernels of the linkage that is wanted are checked. The sizes are multiples of 16, as those of pictures and
windows are, so that Triton compiles the kernels that serve these.
"""

import platform
import warnings
from functools import cache

import torch
import triton
from torch import Tensor

from atc_diffusion.clustering import _torch, _triton
from atc_diffusion.clustering.agreement import FEW, share_of_others
from atc_diffusion.devices import without_autocast

SIZES = (240, 640)  # tokens that one program clusters alone, and tokens of several tiles, which take launched rounds
CHANNELS = 64
CPU = torch.device("cpu")


@cache
def triton_works(device: torch.device, linkage: str, metric: str) -> bool:
    """Whether the Triton kernels of a linkage can be trusted on `device`; warns once if they cannot."""
    problem = _problem(device, linkage, metric)
    if problem is not None:
        warnings.warn(f"{problem}; the CPU clusters instead, and backend='numba' avoids this warning", stacklevel=2)
    return problem is None


def require_triton(device: torch.device, linkage: str, metric: str) -> None:
    """Raise RuntimeError if the Triton kernels of a linkage cannot be trusted on `device`."""
    if problem := _problem(device, linkage, metric):
        raise RuntimeError(f"{problem}; use backend='torch'")


@cache
def _problem(device: torch.device, linkage: str, metric: str) -> str | None:
    """What is wrong with the Triton kernels on `device`: they raise, or find other clusters than the torch form."""
    try:
        wrong = [size for size in SIZES if _share_of_others(device, linkage, metric, size) > FEW]
        if not wrong:
            return None
        problem = f"other clusters of {' and '.join(map(str, wrong))} tokens"
    except Exception as error:  # whatever a compiler or driver raises
        problem = f"{type(error).__name__}: {error}"
    return (
        f"the Triton kernels for {linkage} linkage fail on {_name(device)} ({problem}); please report this, with torch"
        f" {torch.__version__}, Triton {triton.__version__} and Python {platform.python_version()}"
    )


def _share_of_others(device: torch.device, linkage: str, metric: str, num_tokens: int) -> float:
    problem, num_clusters = _draw(metric, num_tokens), num_tokens // 3
    with without_autocast(device), without_autocast(CPU):
        labels = _triton.build_tree(problem.to(device), linkage, metric, num_clusters).cut(num_clusters)
        # In float64, since users may have products of float32 computed in less.
        expected = _torch.build_tree(problem.double(), linkage, metric, num_clusters).cut(num_clusters)
    return share_of_others(labels.cpu(), expected)


def _draw(metric: str, num_tokens: int) -> Tensor:
    tokens = torch.randn(2, num_tokens, CHANNELS, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    return torch.cdist(tokens, tokens) if metric == "precomputed" else tokens


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
