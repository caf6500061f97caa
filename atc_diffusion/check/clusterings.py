"""Every clustering backend of a device against the reference."""

import importlib.util
from collections.abc import Iterator
from functools import partial

import torch

from atc_diffusion.check.finding import Finding, find
from atc_diffusion.clustering import LINKAGES, agglomerate
from atc_diffusion.clustering._installed import HAS_TRITON, numba_works
from atc_diffusion.clustering.agreement import FEW, share_of_others

NUM_TOKENS, NUM_CLUSTERS = 600, 200  # beyond what one Triton program does alone


def check_clusterings(device: torch.device) -> Iterator[Finding]:
    for linkage in LINKAGES:
        for backend in _backends(device):
            subject = f"{linkage} linkage by {backend} for tokens on {device}"
            yield find(subject, partial(_error, device, linkage, backend), FEW)


def _backends(device: torch.device) -> list[str]:
    backends = ["torch"] if device.type in ("cpu", "cuda") else []
    if numba_works():
        backends.append("numba")
    if HAS_TRITON and device.type == "cuda":
        backends.append("triton")
    return backends


def _error(device: torch.device, linkage: str, backend: str) -> float:
    """Share of the tokens that are in other clusters than by the reference."""
    tokens = torch.randn(2, NUM_TOKENS, 16, generator=torch.Generator().manual_seed(0))
    reference = "scipy" if importlib.util.find_spec("scipy") else "torch"
    expected = agglomerate(tokens, NUM_CLUSTERS, linkage, backend=reference)
    labels = agglomerate(tokens.to(device), NUM_CLUSTERS, linkage, backend=backend)
    return share_of_others(labels.cpu(), expected)
