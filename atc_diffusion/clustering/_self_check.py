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
    """Whether the Triton kernels run on `device` and find the torch form's clusters; warns once if they do not."""
    tokens = torch.randn(2, NUM_TOKENS, 16, generator=torch.Generator().manual_seed(0)).to(device)
    try:
        wrong = [linkage for linkage, metric in CASES if _differs(tokens, linkage, metric)]
        problem = f"other clusters with {', '.join(wrong)} linkage" if wrong else None
    except Exception as error:  # whatever a compiler or driver raises
        problem = f"{type(error).__name__}: {error}"
    if problem is not None:
        warnings.warn(
            f"clustering on {_name(device)} falls back to PyTorch, as the Triton kernels fail there ({problem});"
            f" please report this, with torch {torch.__version__}, Triton {triton.__version__} and Python"
            f" {platform.python_version()}; backend='torch' avoids this warning",
            stacklevel=2,
        )
    return problem is None


def _differs(tokens: torch.Tensor, linkage: str, metric: str) -> bool:
    trees = (form.build_tree(tokens, linkage, metric, NUM_CLUSTERS) for form in (_triton, _torch))
    labels, expected = (tree.cut(NUM_CLUSTERS) for tree in trees)
    return not torch.equal(labels, expected)


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
