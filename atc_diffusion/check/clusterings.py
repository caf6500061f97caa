"""Every clustering backend of a device against the reference."""

import importlib.util
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from atc_diffusion.check.finding import Finding, find
from atc_diffusion.clustering import LINKAGES, agglomerate
from atc_diffusion.clustering._installed import HAS_TRITON, numba_works
from atc_diffusion.merge_map import MergeMap

NUM_TOKENS, NUM_CLUSTERS = 600, 200  # beyond what one Triton program does alone
FEW = 0.02  # share of the tokens whose clusters may differ: rounding decides between distances that nearly tie


def check_clusterings(device: torch.device) -> Iterator[Finding]:
    for linkage in LINKAGES:
        for backend in _backends(device):
            subject = f"{linkage} linkage by {backend} for tokens on {device}"
            yield find(subject, partial(_share_of_others, device, linkage, backend), FEW)


def _backends(device: torch.device) -> list[str]:
    backends = ["torch"] if device.type in ("cpu", "cuda") else []
    if numba_works():
        backends.append("numba")
    if HAS_TRITON and device.type == "cuda":
        backends.append("triton")
    return backends


def _share_of_others(device: torch.device, linkage: str, backend: str) -> float:
    """Share of the tokens that are in other clusters than by the reference."""
    tokens = torch.randn(2, NUM_TOKENS, 16, generator=torch.Generator().manual_seed(0))
    reference = "scipy" if importlib.util.find_spec("scipy") else "torch"
    expected = agglomerate(tokens, NUM_CLUSTERS, linkage, backend=reference)
    labels = agglomerate(tokens.to(device), NUM_CLUSTERS, linkage, backend=backend).cpu()
    differs = (_means(tokens, labels) - _means(tokens, expected)).abs().amax(dim=2) > 1e-3
    return differs.float().mean().item()


def _means(tokens: Tensor, labels: Tensor) -> Tensor:
    """Every token replaced by the mean of its cluster."""
    merge_map = MergeMap(labels, NUM_CLUSTERS)
    return merge_map.unmerge(merge_map.merge(tokens))
