"""A kernel that is new to a device clusters a small problem beside the torch form before it is trusted there."""

import platform
import warnings
from functools import cache

import torch
import triton

from atc_diffusion.clustering import _torch, _triton

NUM_TOKENS, NUM_CLUSTERS = 70, 20
CASES = (("average", "cosine"), ("complete", "cosine"), ("single", "cosine"), ("ward", "euclidean"))


@cache
def triton_works(device: torch.device) -> bool:
    """Whether the Triton kernels can be trusted on `device`; warns once if they cannot."""
    problem = _problem(device)
    if problem is not None:
        warnings.warn(f"{problem}; the CPU clusters instead, and backend='numba' avoids this warning", stacklevel=2)
    return problem is None


def require_triton(device: torch.device) -> None:
    """Raise RuntimeError if the Triton kernels cannot be trusted on `device`."""
    if problem := _problem(device):
        raise RuntimeError(f"{problem}; use backend='torch'")


@cache
def _problem(device: torch.device) -> str | None:
    """What is wrong with the Triton kernels on `device`: they raise, or find other clusters than the torch form."""
    tokens = torch.randn(2, NUM_TOKENS, 16, generator=torch.Generator().manual_seed(0)).to(device)
    try:
        wrong = [linkage for linkage, metric in CASES if _differs(tokens, linkage, metric)]
        if not wrong:
            return None
        problem = f"other clusters with {', '.join(wrong)} linkage"
    except Exception as error:  # whatever a compiler or driver raises
        problem = f"{type(error).__name__}: {error}"
    return (
        f"the Triton kernels fail on {_name(device)} ({problem}); please report this, with torch {torch.__version__},"
        f" Triton {triton.__version__} and Python {platform.python_version()}"
    )


def _differs(tokens: torch.Tensor, linkage: str, metric: str) -> bool:
    trees = (form.build_tree(tokens, linkage, metric, NUM_CLUSTERS) for form in (_triton, _torch))
    labels, expected = (tree.cut(NUM_CLUSTERS) for tree in trees)
    return not torch.equal(labels, expected)


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
