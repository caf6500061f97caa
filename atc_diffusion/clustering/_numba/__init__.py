"""Clustering on the matrix of distances, compiled for the CPU: one problem at a time.

Small problems are quick because a round is one loop instead of dozens of tensor operations, and a busy neighbour is
no hindrance because no loop waits for other threads. Only whole problems of a batch are shared out among threads.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import torch
from torch import Tensor

from atc_diffusion.clustering._numba.compiled import Array
from atc_diffusion.clustering._numba.distances import distance_matrices
from atc_diffusion.clustering._numba.reciprocal import LINKAGES, merge_reciprocal
from atc_diffusion.clustering._numba.spanning import span
from atc_diffusion.clustering.tree import ClusterTree

CHUNK = 2**22  # distances computed together, of several problems
ALONE = 2**17  # up to so many distances, threads cost more than they save


def build_tree(tokens: Tensor, linkage: str, metric: str, num_clusters: int, together: int = 1) -> ClusterTree:
    """Cluster `tokens` `[B, N, C]` (`[B, N, N]` if precomputed), every `together` items down to `num_clusters`.

    Items do not wait for each other: each does what it would if all the merges were its own.
    """
    num_tokens = tokens.shape[1]
    kernel = _kernel(linkage, min(num_tokens - 1, together * num_tokens - num_clusters))
    at_once = max(torch.get_num_threads(), CHUNK // num_tokens**2)
    chunks = -(-len(tokens) // at_once) or 1
    parts = [_share_out(kernel, distance_matrices(part, linkage, metric)) for part in tokens.chunk(chunks)]
    merges = parts[0] if len(parts) == 1 else map(np.concatenate, zip(*parts, strict=True))
    parents, heights, rounds = map(torch.from_numpy, merges)
    if linkage == "ward":
        heights = heights.clamp_(min=0).sqrt_()
    return ClusterTree.from_merges(parents, heights, rounds, num_clusters)


def _kernel(linkage: str, num_merges: int) -> Callable[..., None]:
    return span if linkage == "single" else partial(merge_reciprocal, LINKAGES[linkage], num_merges)


def _share_out(kernel: Callable[..., None], matrices: Tensor) -> tuple[Array, Array, Array]:
    """Parents, heights (squared, of Ward's linkage) and rounds `[B, N]`; threads share out the problems of a batch."""
    arrays, shape = matrices.numpy(), matrices.shape[:2]
    merges = np.empty(shape, np.int64), np.empty(shape, arrays.dtype), np.empty(shape, np.int64)
    threads = min(len(arrays), torch.get_num_threads())
    if threads == 1 or arrays.size <= ALONE:
        kernel(arrays, *merges)
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(kernel, *(np.array_split(array, threads) for array in (arrays, *merges))))
    return merges
