"""Exact hierarchical clustering of batches of tokens, down to a chosen number of clusters."""

import importlib.util
import os
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from atc_diffusion.clustering.placement import HAS_TRITON, numba_problem, on_compilation, place
from atc_diffusion.clustering.tree import ClusterTree, check_num_clusters
from atc_diffusion.devices import is_traced, without_autocast

__all__ = ["BACKENDS", "LINKAGES", "METRICS", "Backend", "Linkage", "agglomerate", "cluster_tree", "on_compilation"]

Linkage = Literal["average", "complete", "single", "ward"]
Backend = Literal["torch", "numba", "scipy", "triton"]

LINKAGES: tuple[Linkage, ...] = get_args(Linkage)
METRICS = ("cosine", "euclidean", "precomputed")
BACKENDS: tuple[Backend, ...] = get_args(Backend)

Merges = tuple[Tensor, Tensor, Tensor]


def agglomerate(
    tokens: Tensor, num_clusters: int, linkage: str = "average", metric: str | None = None, backend: str | None = None
) -> Tensor:
    """Label every token with its cluster (Agglomerative Token Clustering, Haurum et al. 2024, section 3.2).

    Clusters are joined bottom-up, always the two closest, until `num_clusters` are left.

    Args:
        tokens: `[B, N, C]` of any float type, or `[B, N, N]` symmetric distances if `metric="precomputed"`.
            Float64 is clustered in float64, all else in float32. Entries that are not finite count as 0 in
            tokens and as very far in distances. Entries beyond 1e14 count as 1e14, and cosine distance has no
            directions of vectors shorter than 1e-12.
        num_clusters: how many clusters to leave, from 1 to `N`.
        linkage: distance between clusters: "single" (Eq. 1), "complete" (Eq. 2), "average" (Eq. 3) or "ward".
        metric: distance between tokens: "cosine", "euclidean" or "precomputed". None: "euclidean" for Ward's
            linkage, which is defined for it alone, and "cosine" for the others.
        backend: "numba" (compiled for the CPU), "triton" (CUDA kernels, float32, no host synchronisation), "torch"
            (batched, any device, least memory) or "scipy" (the reference, on the CPU). None: the fastest that is
            installed for these tokens; those on devices other than CUDA are clustered on the CPU.

    Returns:
        Labels `[B, N]` int64 in `0..num_clusters - 1`, on the tokens' device; clusters are numbered by their first
        token, so two equal partitions have equal labels. Differentiable code may use them as constants.

    Raises:
        ValueError: for an unknown name, a shape or a number of clusters that does not fit, or a backend that is not
            installed or does not take such tokens.
        RuntimeError: if `backend="triton"` fails on the device, or finds other clusters there than "torch".

    Example:
        >>> agglomerate(torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.9, 0.1]]]), num_clusters=2)
        tensor([[0, 1, 0]])
    """
    return cluster_tree(tokens, num_clusters, linkage, metric, backend).cut(num_clusters)


def cluster_tree(
    tokens: Tensor,
    num_clusters: int = 1,
    linkage: str = "average",
    metric: str | None = None,
    backend: str | None = None,
) -> ClusterTree:
    """Cluster once, cut often: the tree behind `agglomerate`, whose arguments these are.

    `num_clusters` is the least number of clusters that the tree will be asked for; more are cheaper.

    Example:
        >>> tree = cluster_tree(torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.9, 0.1]]]))
        >>> tree.cut(2), tree.cut_at(distance=0.001)
        (tensor([[0, 1, 0]]), tensor([[0, 1, 2]]))
    """
    metric = check_choices(linkage, metric, backend)
    check_tokens(tokens, metric, backend)
    check_num_clusters(num_clusters, tokens.shape[1])
    return ClusterTree(*find_merges(tokens, num_clusters, linkage, metric, backend), num_clusters, tokens.device)


def find_merges(
    tokens: Tensor, num_clusters: int, linkage: str, metric: str, backend: str | None, together: int = 1
) -> Merges:
    """Parents, heights and order of `ClusterTree`s, of which every `together` will be cut down to `num_clusters`."""
    if not len(tokens):
        return _unknown_merges(tokens)
    # Otherwise no operator: its dispatch alone takes a fifth of a small clustering.
    find = _opaque_merges if is_traced(tokens) else _merges
    return find(tokens.detach(), num_clusters, linkage, metric, backend, together)


def check_choices(linkage: str, metric: str | None = None, backend: str | None = None) -> str:
    """The metric meant; raises ValueError where a name is unknown or the two do not go together."""
    check_member("linkage", linkage, LINKAGES)
    if metric is None:
        metric = "euclidean" if linkage == "ward" else "cosine"
    check_member("metric", metric, METRICS)
    if (linkage, metric) == ("ward", "cosine"):
        raise ValueError("linkage='ward' is defined for Euclidean distance; use metric='euclidean' or 'precomputed'")
    if backend is not None:
        check_member("backend", backend, BACKENDS)
    if backend == "scipy" and importlib.util.find_spec("scipy") is None:
        raise ValueError("backend='scipy' needs SciPy; run `pip install scipy` or use backend='torch'")
    if backend == "numba" and (problem := numba_problem()):
        raise ValueError(f"backend='numba' cannot be used: {problem}; use backend='torch'")
    if backend == "triton" and not HAS_TRITON:
        raise ValueError("backend='triton' needs Triton; run `pip install triton` or use backend='torch'")
    return metric


def check_member(name: str, value: object, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_tokens(tokens: Tensor, metric: str = "cosine", backend: str | None = None) -> None:
    if not isinstance(tokens, Tensor):
        raise ValueError(f"tokens must be a float tensor [B, N, C], got {type(tokens).__name__}")
    if tokens.ndim != 3 or not tokens.is_floating_point():
        raise ValueError(f"tokens must be a float tensor [B, N, C], got {tokens.dtype} {list(tokens.shape)}")
    if metric == "precomputed" and tokens.shape[1] != tokens.shape[2]:
        raise ValueError(f"precomputed distances must be square, [B, N, N], got {list(tokens.shape)}")
    if backend == "triton" and tokens.dtype == torch.float64:
        raise ValueError("backend='triton' clusters in float32; use backend='torch' for torch.float64")
    if backend == "triton" and not tokens.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(f"backend='triton' needs tokens on a CUDA device, got {tokens.device}; use backend='torch'")


def _merges(tokens: Tensor, num_clusters: int, linkage: str, metric: str, backend: str | None, together: int) -> Merges:
    """As `find_merges`, on the device where they were found."""
    chosen, device = place(tokens, linkage, metric, backend)
    tokens = tokens.to(device).to(_working_dtype(tokens))
    with without_autocast(device):  # half precision cannot rank distances
        backend_module = importlib.import_module(f"atc_diffusion.clustering._{chosen}")
        tree: ClusterTree = backend_module.build_tree(tokens, num_clusters, linkage, metric, together)
    return tree.parents.contiguous(), tree.heights.to(tokens.dtype).contiguous(), tree.order.contiguous()


@torch.library.custom_op("atc_diffusion::cluster_tree", mutates_args=())
def _opaque_merges(
    tokens: Tensor, num_clusters: int, linkage: str, metric: str, backend: str | None, together: int
) -> tuple[Tensor, Tensor, Tensor]:
    """As `_merges`, on the tokens' device, which is all that torch.compile and `torch.func` see."""
    parents, heights, order = _merges(tokens, num_clusters, linkage, metric, backend, together)
    return parents.to(tokens.device), heights.to(tokens.device), order.to(tokens.device)


@_opaque_merges.register_fake
def _unknown_merges(tokens: Tensor, *_: object) -> Merges:
    """Of the right shapes and types alone."""
    names = tokens.new_empty(tokens.shape[:2], dtype=torch.int64)
    return names, torch.empty_like(names, dtype=_working_dtype(tokens)), torch.empty_like(names)


@_opaque_merges.register_vmap
def _(info: Any, in_dims: tuple[int | None, ...], tokens: Tensor, *options: Any) -> tuple[list[Tensor], list[int]]:
    """Cluster the mapped batches as one."""
    assert in_dims[0] is not None  # or there would be nothing to map
    tokens = tokens.movedim(in_dims[0], 0)
    merges = _opaque_merges(tokens.flatten(0, 1), *options)
    return [x.unflatten(0, tokens.shape[:2]) for x in merges], [0] * len(merges)


def _working_dtype(tokens: Tensor) -> torch.dtype:
    return torch.float64 if tokens.dtype == torch.float64 else torch.float32
