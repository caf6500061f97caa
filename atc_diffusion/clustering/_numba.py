"""Clustering on the matrix of distances, compiled for the CPU: one problem at a time.

Small problems are quick because a round is one loop instead of dozens of tensor operations, and a busy neighbour is
no hindrance because no loop waits for other threads. Only whole problems of a batch are shared out among threads.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np
import torch
from numba.core.caching import FunctionCache
from torch import Tensor

from atc_diffusion.clustering._clusters import pairwise_distances, prepare
from atc_diffusion.clustering._reciprocal import CODES, Array, compiled, merge_reciprocal
from atc_diffusion.clustering.tree import ClusterTree

CHUNK = 2**22  # distances computed together, of several problems: 16 MiB in float32
SERIAL = 2**17  # distances up to which threads cost more than they save


def build_tree(tokens: Tensor, num_clusters: int, linkage: str, metric: str, together: int = 1) -> ClusterTree:
    """Cluster `tokens` `[B, N, C]` (`[B, N, N]` if precomputed), every `together` items down to `num_clusters`.

    Items do not wait for each other: each does what it would if all the merges were its own.
    """
    num_tokens = tokens.shape[1]
    num_merges = min(num_tokens - 1, together * num_tokens - num_clusters)
    at_once = max(torch.get_num_threads(), CHUNK // max(num_tokens**2, 1))
    chunks = -(-len(tokens) // at_once) or 1
    merge = partial(_merge, CODES[linkage], num_merges)
    parts = [merge(_distance_matrices(part, linkage, metric)) for part in tokens.chunk(chunks)]
    merges = parts[0] if len(parts) == 1 else map(np.concatenate, zip(*parts, strict=True))
    parents, heights, rounds = map(torch.from_numpy, merges)
    if linkage == "ward":
        heights = heights.clamp_(min=0).sqrt_()
    return ClusterTree.from_merges(parents, heights, rounds, num_clusters)


def _merge(linkage: int, num_merges: int, matrices: Tensor) -> tuple[Array, Array, Array]:
    """Parents, heights (squared, of Ward's linkage) and rounds `[B, N]`; threads share out the problems of a batch."""
    arrays, shape = matrices.numpy(), matrices.shape[:2]
    merges = np.empty(shape, np.int64), np.empty(shape, arrays.dtype), np.empty(shape, np.int64)
    kernel, threads = partial(_merge_reciprocal, linkage, num_merges), min(len(arrays), torch.get_num_threads())
    if threads == 1 or arrays.size <= SERIAL:
        kernel(arrays, *merges)
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(kernel, *(np.array_split(array, threads) for array in (arrays, *merges))))
    return merges


def _distance_matrices(tokens: Tensor, linkage: str, metric: str) -> Tensor:
    """Distances `[B, N, N]`, to be written over; squared for Ward's linkage, whose update is linear in squares."""
    tokens = prepare(tokens, metric)
    if (linkage, metric) == ("ward", "euclidean"):  # without a root that would be squared again
        norms = tokens.square().sum(dim=2)
        return torch.baddbmm(norms[:, None, :], tokens, tokens.mT, alpha=-2).add_(norms[:, :, None])
    distances = pairwise_distances(tokens, metric)
    return distances.square_() if linkage == "ward" else distances


def entry(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile `function` at its first call, and cache it on disk where that is possible."""
    dispatcher = compiled(function)
    with suppress(RuntimeError, OSError):  # no directory is writable
        dispatcher._cache = _Cache(function)
    return dispatcher


class _Cache(FunctionCache):  # type: ignore[misc]  # Numba is not annotated
    """A cache that cannot end a call: what it cannot read is compiled, and what it cannot write is not kept."""

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(sig, target_context)
        except Exception:  # whatever damaged files make Numba and pickle raise
            with suppress(OSError):
                self.flush()  # or saving would read the damaged index again
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        with suppress(OSError):  # a full disk, an exceeded quota, a directory that became read-only
            super().save_overload(sig, data)


_merge_reciprocal = entry(merge_reciprocal)
