"""Exact hierarchical clustering of batches of tokens, down to a chosen number of clusters."""

import importlib.util
import os
from collections.abc import Callable

import torch
from torch import Tensor

from atc_diffusion.clustering._installed import HAS_NUMBA, HAS_TRITON, numba_works
from atc_diffusion.clustering.tree import ClusterTree, check_num_clusters

LINKAGES = ("average", "complete", "single", "ward")
METRICS = ("cosine", "euclidean", "precomputed")
BACKENDS = ("torch", "numba", "scipy", "triton")

MATRIX_FREE = (("average", "cosine"), ("ward", "euclidean"))  # clustered from means, without an N x N matrix
LARGEST_MATRIX = 4096  # tokens up to which these are quicker with the matrix


def agglomerate(
    tokens: Tensor, num_clusters: int, linkage: str = "average", metric: str | None = None, backend: str | None = None
) -> Tensor:
    """Label every token with its cluster (Agglomerative Token Clustering, Haurum et al. 2024, section 3.2).

    Clusters are joined bottom-up, always the two closest, until `num_clusters` are left.

    Args:
        tokens: `[B, N, C]` of any float type, or `[B, N, N]` symmetric distances if `metric="precomputed"`.
            Float64 is clustered in float64, all else in float32. Entries that are not finite count as 0 in
            tokens and as very far in distances.
        num_clusters: how many clusters to leave, from 1 to `N`.
        linkage: distance between clusters: "single" (Eq. 1), "complete" (Eq. 2), "average" (Eq. 3) or "ward".
        metric: distance between tokens: "cosine", "euclidean" or "precomputed". None: "euclidean" for Ward's
            linkage, which is defined for it alone, and "cosine" for the others.
        backend: "numba" (compiled for the CPU), "triton" (CUDA kernels, float32, no host synchronisation), "torch"
            (batched, any device, least memory) or "scipy" (the reference, on the CPU). None: the fastest that is
            installed for these tokens.

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
    check_num_clusters(num_clusters, tokens.shape[1])
    return cluster_tree(tokens, linkage, metric, backend, num_clusters).cut(num_clusters)


def cluster_tree(
    tokens: Tensor,
    linkage: str = "average",
    metric: str | None = None,
    backend: str | None = None,
    num_clusters: int = 1,
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
    # The operator's dispatch alone takes a fifth of a small clustering.
    merges = _opaque_merges if torch.compiler.is_compiling() else _merges
    parents, heights, order = merges(tokens.detach(), num_clusters, linkage, metric, backend)
    return ClusterTree(parents, heights, order, num_clusters)


def check_choices(linkage: str, metric: str | None = None, backend: str | None = None) -> str:
    """The metric meant; raises ValueError where a name is unknown or the two do not go together."""
    check_member("linkage", linkage, LINKAGES)
    metric = metric or ("euclidean" if linkage == "ward" else "cosine")
    check_member("metric", metric, METRICS)
    if (linkage, metric) == ("ward", "cosine"):
        raise ValueError("linkage='ward' is defined for Euclidean distance; use metric='euclidean' or 'precomputed'")
    if backend is not None:
        check_member("backend", backend, BACKENDS)
    if backend == "scipy" and importlib.util.find_spec("scipy") is None:
        raise ValueError("backend='scipy' needs SciPy; run `pip install scipy` or use backend='torch'")
    if backend == "numba" and not HAS_NUMBA:
        raise ValueError("backend='numba' needs Numba; run `pip install numba` or use backend='torch'")
    if backend == "triton" and not HAS_TRITON:
        raise ValueError("backend='triton' needs Triton; run `pip install triton` or use backend='torch'")
    return metric


def check_member(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_tokens(tokens: Tensor, metric: str, backend: str | None = None) -> None:
    if tokens.ndim != 3 or not tokens.is_floating_point():
        raise ValueError(f"tokens must be a float tensor [B, N, C], got {tokens.dtype} {list(tokens.shape)}")
    if metric == "precomputed" and tokens.shape[1] != tokens.shape[2]:
        raise ValueError(f"precomputed distances must be square, [B, N, N], got {list(tokens.shape)}")
    if backend == "triton" and tokens.dtype == torch.float64:
        raise ValueError("backend='triton' clusters in float32; use backend='torch' for torch.float64")
    if backend == "triton" and not tokens.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(f"backend='triton' needs tokens on a CUDA device, got {tokens.device}; use backend='torch'")


def fastest_backend(tokens: Tensor, linkage: str, metric: str) -> str:
    """What None means; a matter of speed and memory alone."""
    if tokens.is_cuda:
        return "triton" if HAS_TRITON and tokens.dtype != torch.float64 else "torch"
    matrix_free = (linkage, metric) in MATRIX_FREE and tokens.shape[1] > LARGEST_MATRIX
    return "numba" if tokens.device.type == "cpu" and not matrix_free and numba_works() else "torch"


def _trusted_backend(asked: str | None, tokens: Tensor, linkage: str, metric: str) -> str:
    """What was asked for, or the fastest; Triton's kernels only where they are right on the tokens' device."""
    backend = asked or fastest_backend(tokens, linkage, metric)
    if backend != "triton":
        return backend
    from atc_diffusion.clustering._self_check import require_triton, triton_works

    if asked is not None:
        require_triton(tokens.device)
        return asked
    return backend if triton_works(tokens.device) else "torch"


def _merges(
    tokens: Tensor, num_clusters: int, linkage: str, metric: str, backend: str | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Parents, heights and order of a `ClusterTree`."""
    with torch.autocast(tokens.device.type, enabled=False):  # half precision cannot rank distances
        build_tree = _backend(_trusted_backend(backend, tokens, linkage, metric))
        tree = build_tree(tokens.to(_working_dtype(tokens)), linkage, metric, num_clusters)
    heights = tree.heights.to(_working_dtype(tokens))
    return tree.parents.contiguous(), heights.contiguous(), tree.order.contiguous()


_opaque_merges = torch.library.custom_op("atc_diffusion::cluster_tree", _merges, mutates_args=())  # to torch.compile


@_opaque_merges.register_fake
def _(
    tokens: Tensor, num_clusters: int, linkage: str, metric: str, backend: str | None
) -> tuple[Tensor, Tensor, Tensor]:
    shape = tokens.shape[:2]
    names = tokens.new_empty(shape, dtype=torch.int64)
    return names, tokens.new_empty(shape, dtype=_working_dtype(tokens)), torch.empty_like(names)


def _working_dtype(tokens: Tensor) -> torch.dtype:
    return torch.promote_types(tokens.dtype, torch.float32)


def _backend(name: str) -> Callable[[Tensor, str, str, int], ClusterTree]:
    if name == "scipy":
        from atc_diffusion.clustering._scipy import build_tree
    elif name == "numba":
        from atc_diffusion.clustering._numba import build_tree
    elif name == "triton":
        from atc_diffusion.clustering._triton import build_tree
    else:
        from atc_diffusion.clustering._torch import build_tree
    return build_tree
