"""Clustering on the matrix of distances, compiled for the CPU: one problem at a time.

Small problems are quick because a round is one loop instead of dozens of tensor operations, and a busy neighbour is
no hindrance because no loop waits for other threads. Only whole problems of a batch are shared out among threads.
"""

import math
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import torch
from numba import njit
from torch import Tensor

from atc_diffusion.clustering._clusters import LARGEST_ENTRY, pairwise_distances, prepare
from atc_diffusion.clustering._numba.compiled import Array, entry, inner
from atc_diffusion.clustering._numba.reciprocal import CODES, merge_reciprocal
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
    kernel, threads = partial(merge_reciprocal, linkage, num_merges), min(len(arrays), torch.get_num_threads())
    if threads == 1 or arrays.size <= SERIAL:
        kernel(arrays, *merges)
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(kernel, *(np.array_split(array, threads) for array in (arrays, *merges))))
    return merges


def _distance_matrices(tokens: Tensor, linkage: str, metric: str) -> Tensor:
    """Distances `[B, N, N]`; squared for Ward's linkage, whose update is linear in squares."""
    if metric == "precomputed":
        given = prepare(tokens, metric)
        return given.square_() if linkage == "ward" else given
    tokens = tokens.contiguous()
    prepared = torch.empty_like(tokens)
    (_normalize if metric == "cosine" else _centre)(tokens.numpy(), prepared.numpy())
    if linkage != "ward":
        return pairwise_distances(prepared, metric)
    norms = prepared.square().sum(dim=2)
    return torch.baddbmm(norms[:, None, :], prepared, prepared.mT, alpha=-2).add_(norms[:, :, None])


@entry
def _normalize(tokens: Array, prepared: Array) -> None:
    """`prepare` for cosine distance, in one pass."""
    for item in range(len(tokens)):
        for i in range(tokens.shape[1]):
            _clean(tokens[item, i], prepared[item, i])
            scale = 1 / max(math.sqrt(_square_norm(prepared[item, i])), 1e-12)
            for channel in range(tokens.shape[2]):
                prepared[item, i, channel] *= scale


@entry
def _centre(tokens: Array, prepared: Array) -> None:
    """`prepare` for Euclidean distance, in two passes."""
    for item in range(len(tokens)):
        mean = np.zeros(tokens.shape[2])
        for i in range(tokens.shape[1]):
            _clean(tokens[item, i], prepared[item, i])
            mean += prepared[item, i]
        mean /= max(tokens.shape[1], 1)
        for i in range(tokens.shape[1]):
            for channel in range(tokens.shape[2]):
                prepared[item, i, channel] -= mean[channel]


@inner
def _clean(token: Array, cleaned: Array) -> None:
    largest = token.dtype.type(LARGEST_ENTRY)
    for channel in range(len(token)):
        value = min(max(token[channel], -largest), largest)
        cleaned[channel] = value if abs(token[channel]) < np.inf else 0


@njit(nogil=True, fastmath={"reassoc", "contract"})  # lets LLVM sum in vector instructions; NaN still counts as NaN
def _square_norm(token: Array) -> float:
    total = 0.0
    for channel in range(len(token)):
        total += np.float64(token[channel]) ** 2
    return total


def number_clusters(parents: Tensor, absorbed: Tensor) -> Tensor:
    """Labels `[B, N]` from the parent of each token that was absorbed (mask `absorbed`), in one pass."""
    labels = torch.empty_like(parents)
    _number(parents.numpy(), absorbed.numpy(), labels.numpy())
    return labels


@entry
def _number(parents: Array, absorbed: Array, labels: Array) -> None:
    """Clusters are named by their first token, so parents come before their children."""
    for item in range(len(parents)):
        count = 0
        for token in range(parents.shape[1]):
            if absorbed[item, token]:
                labels[item, token] = labels[item, parents[item, token]]
            else:
                labels[item, token] = count
                count += 1
