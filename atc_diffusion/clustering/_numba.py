"""Reciprocal merging, as in `_torch.py`, compiled for the CPU: one problem at a time, on the matrix of distances.

Small problems are quick because a round is one loop instead of dozens of tensor operations, and a busy neighbour is
no hindrance because no loop waits for other threads. Only whole problems of a batch are shared out among threads.
"""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import njit
from torch import Tensor

from atc_diffusion.clustering._prepare import FAR as FAR_APART
from atc_diffusion.clustering._prepare import prepare
from atc_diffusion.clustering._torch import pairwise_distances
from atc_diffusion.clustering.tree import ClusterTree

Array = np.ndarray[Any, np.dtype[Any]]

LINKAGES = {"average": 0, "complete": 1, "ward": 2}
AVERAGE, COMPLETE = LINKAGES["average"], LINKAGES["complete"]
FAR = 3e38  # beyond every distance, finite in float32
LANES = 64  # places that are compared side by side: LLVM makes vector instructions of them
CHUNK = 2**22  # distances computed together, of several problems
ALONE = 2**17  # up to so many distances, threads cost more than they save
RESCANS = 8  # neighbours that a merge may leave to search anew


def build_tree(tokens: Tensor, linkage: str, metric: str, num_clusters: int) -> ClusterTree:
    """Cluster `tokens` `[B, N, C]` (`[B, N, N]` if precomputed) down to `num_clusters`."""
    num_tokens = tokens.shape[1]
    kernel = _kernel(linkage, num_tokens - num_clusters)
    together = max(torch.get_num_threads(), CHUNK // num_tokens**2)
    chunks = -(-len(tokens) // together) or 1
    parts = [_share_out(kernel, _distances(part, linkage, metric)) for part in tokens.cpu().chunk(chunks)]
    merges = parts[0] if len(parts) == 1 else map(np.concatenate, zip(*parts, strict=True))
    parents, heights, rounds = (torch.from_numpy(array).to(tokens.device) for array in merges)
    if linkage == "ward":
        heights = heights.clamp_(min=0).sqrt_()
    return ClusterTree.from_merges(parents, heights, rounds, num_clusters)


def _kernel(linkage: str, num_merges: int) -> Callable[..., None]:
    return _span if linkage == "single" else partial(_merge_reciprocal, LINKAGES[linkage], num_merges)


def _distances(tokens: Tensor, linkage: str, metric: str) -> Tensor:
    """Distances `[B, N, N]`; squared for Ward's linkage, whose update is linear in squares."""
    if metric == "precomputed":
        distances = prepare(tokens, metric)
        return distances.square_() if linkage == "ward" else distances
    tokens = tokens.contiguous()
    prepared = torch.empty_like(tokens)
    (_normalize if metric == "cosine" else _centre)(tokens.numpy(), prepared.numpy())
    if linkage != "ward":
        return pairwise_distances(prepared, metric)
    norms = prepared.square().sum(dim=2)
    return torch.baddbmm(norms[:, None, :], prepared, prepared.mT, alpha=-2).add_(norms[:, :, None])


def _share_out(kernel: Callable[..., None], distances: Tensor) -> tuple[Array, Array, Array]:
    """Parents, heights (squared, of Ward's linkage) and rounds `[B, N]`; threads share out the problems of a batch."""
    matrices, shape = distances.numpy(), distances.shape[:2]
    merges = np.empty(shape, np.int64), np.empty(shape, matrices.dtype), np.empty(shape, np.int64)
    threads = min(len(matrices), torch.get_num_threads())
    if threads == 1 or matrices.size <= ALONE:
        kernel(matrices, *merges)
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(kernel, *(np.array_split(array, threads) for array in (matrices, *merges))))
    return merges


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled at its first call, and kept on disk if any directory for that is writable."""
    dispatcher = njit(nogil=True)(function)
    with suppress(RuntimeError):
        dispatcher.enable_caching()
    return dispatcher


@_compiled
def _normalize(tokens: Array, prepared: Array) -> None:
    """As `prepare` does for cosine distance, in one pass."""
    for item in range(len(tokens)):
        for i in range(tokens.shape[1]):
            _clean(tokens[item, i], prepared[item, i])
            scale = 1 / max(math.sqrt(_square_norm(prepared[item, i])), 1e-12)
            for channel in range(tokens.shape[2]):
                prepared[item, i, channel] *= scale


@_compiled
def _centre(tokens: Array, prepared: Array) -> None:
    """As `prepare` does for Euclidean distance, in two passes."""
    for item in range(len(tokens)):
        mean = np.zeros(tokens.shape[2])
        for i in range(tokens.shape[1]):
            _clean(tokens[item, i], prepared[item, i])
            mean += prepared[item, i]
        mean /= max(tokens.shape[1], 1)
        for i in range(tokens.shape[1]):
            for channel in range(tokens.shape[2]):
                prepared[item, i, channel] -= mean[channel]


@njit(nogil=True)
def _clean(token: Array, finite: Array) -> None:
    far = token.dtype.type(FAR_APART)
    for channel in range(len(token)):
        value = min(max(token[channel], -far), far)
        finite[channel] = value if abs(token[channel]) < np.inf else 0


@njit(nogil=True, fastmath={"reassoc", "contract"})
def _square_norm(token: Array) -> float:
    total = 0.0
    for channel in range(len(token)):
        total += np.float64(token[channel]) ** 2
    return total


class _Clusters(NamedTuple):
    """What is known of each cluster, `[N]`, in the place of its first token."""

    sizes: Array
    formed: Array  # height at which it came to be
    bounds: Array  # least possible distance to any other cluster
    neighbours: Array  # the nearest cluster
    stale: Array  # whether that one may no longer be it
    grown: Array  # the round in which it last took in another
    gone: Array  # 0, or FAR for those that are merged or need no further look
    least: Array  # room for `_nearest`
    apart: Array


class _Pairs(NamedTuple):
    """The clusters that are joined in one round."""

    first: Array
    second: Array
    distances: Array


@_compiled
def _merge_reciprocal(
    linkage: int, num_merges: int, matrices: Array, parents: Array, heights: Array, rounds: Array
) -> None:
    """Join reciprocal pairs until no distance is left below the `num_merges`-th smallest height."""
    for item in range(len(matrices)):
        _merge_one(linkage, num_merges, matrices[item], parents[item], heights[item], rounds[item])


@njit(nogil=True)
def _merge_one(linkage: int, num_merges: int, matrix: Array, parents: Array, heights: Array, rounds: Array) -> None:
    n, dtype = len(matrix), matrix.dtype
    clusters = _Clusters(
        np.ones(n, dtype),
        np.full(n, -FAR, dtype),
        np.zeros(n, dtype),
        np.arange(n),
        np.ones(n, np.bool_),
        np.full(n, -1),
        np.zeros(n, dtype),
        np.empty(LANES, dtype),
        np.empty(LANES, np.int32),
    )
    parents[:], heights[:], rounds[:] = clusters.neighbours, np.inf, 0
    active, number, merged, thrifty = np.arange(n), 0, 0, False
    while len(active) > 1 and num_merges > 0:
        _search(matrix, clusters, active, thrifty)
        pairs = _pair(matrix, clusters, active)
        _record(clusters, pairs, number, parents, heights, rounds)
        merged += len(pairs.first)
        if merged >= num_merges:
            active = _drop(clusters, active, _smallest(heights, num_merges - 1))
        else:
            active = _drop(clusters, active, FAR)
        _join(linkage, matrix, clusters, active, pairs)
        thrifty = _mark_stale(clusters, active, number) > RESCANS * len(pairs.first)
        number += 1


@njit(nogil=True)
def _search(matrix: Array, clusters: _Clusters, active: Array, thrifty: bool) -> None:
    """Find the nearest neighbours of stale clusters; if `thrifty`, of those alone that may be the closest of all.

    Where one cluster is the neighbour of most others and grows by one at a time, all of them are stale every time.
    """
    limit = np.inf
    for i in active:
        if thrifty and not clusters.stale[i]:
            limit = min(limit, clusters.bounds[i])
    for i in active:
        if clusters.stale[i] and clusters.bounds[i] <= limit:
            clusters.gone[i] = FAR
            clusters.neighbours[i] = _nearest(matrix[i], clusters.gone, i, clusters.least, clusters.apart)
            clusters.gone[i] = 0
            clusters.bounds[i] = matrix[i, clusters.neighbours[i]]
            clusters.stale[i] = False


@njit(nogil=True)
def _nearest(distances: Array, gone: Array, i: int, least: Array, apart: Array) -> int:
    """Of the nearest that are not gone, the one of the smallest i XOR j.

    Being symmetric, that pairs equal tokens off instead of sending all of them to one.
    """
    n = len(distances)
    least[:] = np.inf
    for start in range(0, n - n % LANES, LANES):
        for lane in range(LANES):
            distance, xor = distances[start + lane] + gone[start + lane], np.int32((start + lane) ^ i)
            nearer = (distance < least[lane]) | ((distance == least[lane]) & (xor < apart[lane]))
            least[lane] = distance if nearer else least[lane]
            apart[lane] = xor if nearer else apart[lane]
    for j in range(n - n % LANES, n):
        lane, distance, xor = j % LANES, distances[j] + gone[j], np.int32(j ^ i)
        if distance < least[lane] or (distance == least[lane] and xor < apart[lane]):
            least[lane], apart[lane] = distance, xor
    best = 0
    for lane in range(1, LANES):
        if least[lane] < least[best] or (least[lane] == least[best] and apart[lane] < apart[best]):
            best = lane
    return apart[best] ^ i


@njit(nogil=True)
def _pair(matrix: Array, clusters: _Clusters, active: Array) -> _Pairs:
    """The reciprocal pairs; rounding may leave none, so the closest pair is always one."""
    bounds, neighbours, stale = clusters.bounds, clusters.neighbours, clusters.stale
    closest = active[0]
    for i in active:
        closest = i if bounds[i] < bounds[closest] else closest
    partner = neighbours[closest]
    neighbours[partner], bounds[partner], stale[partner] = closest, bounds[closest], False
    pairs = _Pairs(np.empty_like(active), np.empty_like(active), np.empty(len(active), matrix.dtype))
    count = 0
    for i in active:
        j = neighbours[i]
        if i < j and neighbours[j] == i and not stale[i] and not stale[j]:
            pairs.first[count], pairs.second[count], pairs.distances[count] = i, j, matrix[i, j]
            count += 1
    return _Pairs(pairs.first[:count], pairs.second[:count], pairs.distances[:count])


@njit(nogil=True)
def _record(clusters: _Clusters, pairs: _Pairs, number: int, parents: Array, heights: Array, rounds: Array) -> None:
    for pair in range(len(pairs.first)):
        into, absorbed = pairs.first[pair], pairs.second[pair]
        formed = max(clusters.formed[into], clusters.formed[absorbed])
        height = max(min(clusters.bounds[into], clusters.bounds[absorbed]), formed)
        parents[absorbed], heights[absorbed], rounds[absorbed] = into, height, number
        clusters.formed[into] = clusters.bounds[into] = height
        clusters.grown[into] = number
        clusters.stale[into], clusters.gone[absorbed] = True, FAR


@njit(nogil=True)
def _smallest(values: Array, k: int) -> float:
    """The value that is at `k` in order (Hoare's quickselect; NumPy's own takes five seconds to compile)."""
    values, low, high = values.copy(), 0, len(values) - 1
    while low < high:
        pivot, i, j = values[k], low, high
        while i <= j:
            while values[i] < pivot:
                i += 1
            while values[j] > pivot:
                j -= 1
            if i <= j:
                values[i], values[j] = values[j], values[i]
                i, j = i + 1, j - 1
        low, high = (i if j < k else low), (j if k < i else high)
    return values[k]


@njit(nogil=True)
def _drop(clusters: _Clusters, active: Array, last: float) -> Array:
    """The active clusters that may still be joined below the height `last`."""
    count = 0
    for i in active:
        if clusters.bounds[i] >= last:
            clusters.gone[i] = FAR
        if clusters.gone[i] == 0:
            active[count] = i
            count += 1
    return active[:count]


@njit(nogil=True)
def _mark_stale(clusters: _Clusters, active: Array, number: int) -> int:
    """A cluster needs a new neighbour once its own is gone or has grown; how many do."""
    count = 0
    for i in active:
        neighbour = clusters.neighbours[i]
        if clusters.gone[neighbour] > 0 or clusters.grown[neighbour] == number:
            clusters.stale[i] = True
        count += clusters.stale[i]
    return count


@njit(nogil=True)
def _join(linkage: int, matrix: Array, clusters: _Clusters, active: Array, pairs: _Pairs) -> None:
    """Distances of the unions: first in the rows of all pairs, then in their columns, row by row as memory lies."""
    sizes = clusters.sizes
    for pair in range(len(pairs.first)):
        i, j = pairs.first[pair], pairs.second[pair]
        if clusters.gone[i] == 0:
            _join_rows(linkage, matrix[i], matrix[j], pairs.distances[pair], sizes[i], sizes[j], sizes)
    for pair in range(len(pairs.first)):
        sizes[pairs.first[pair]] += sizes[pairs.second[pair]]
    for k in active:
        _join_columns(linkage, matrix[k], pairs, sizes, sizes[k])


@njit(nogil=True)
def _join_rows(linkage: int, row: Array, other: Array, d_ij: float, n_i: float, n_j: float, sizes: Array) -> None:
    if linkage == AVERAGE:
        share = n_j / (n_i + n_j)
        for k in range(len(row)):
            row[k] += (other[k] - row[k]) * share
    elif linkage == COMPLETE:
        for k in range(len(row)):
            row[k] = max(row[k], other[k])
    else:
        for k in range(len(row)):
            row[k] = _ward(row[k], other[k], d_ij, n_i, n_j, sizes[k])


@njit(nogil=True)
def _join_columns(linkage: int, row: Array, pairs: _Pairs, sizes: Array, n_k: float) -> None:
    for pair in range(len(pairs.first)):
        i, j = pairs.first[pair], pairs.second[pair]
        if linkage == AVERAGE:
            row[i] += (row[j] - row[i]) * (sizes[j] / sizes[i])
        elif linkage == COMPLETE:
            row[i] = max(row[i], row[j])
        else:
            row[i] = _ward(row[i], row[j], pairs.distances[pair], sizes[i] - sizes[j], sizes[j], n_k)


@njit(nogil=True)
def _ward(d_ki: float, d_kj: float, d_ij: float, n_i: float, n_j: float, n_k: float) -> float:
    """Ward's update, of squared distances."""
    return ((n_i + n_k) * d_ki + (n_j + n_k) * d_kj - n_k * d_ij) / (n_i + n_j + n_k)


def _span(matrices: Array, parents: Array, heights: Array, rounds: Array) -> None:
    """Single linkage, by the minimum spanning tree as in `_single.py`."""
    sources, targets, lengths = (np.zeros_like(array[:, 1:]) for array in (parents, parents, heights))
    _find_edges(matrices, sources, targets, lengths)
    _join_edges(lengths.argsort(axis=1, kind="stable"), sources, targets, lengths, parents, heights, rounds)


@_compiled
def _find_edges(matrices: Array, sources: Array, targets: Array, lengths: Array) -> None:
    """Both ends and the length `[B, N - 1]` of the spanning trees' edges, by Prim's algorithm."""
    for item in range(len(matrices)):
        _span_one(matrices[item], sources[item], targets[item], lengths[item])


@njit(nogil=True)
def _span_one(matrix: Array, sources: Array, targets: Array, lengths: Array) -> None:
    n = len(matrix)
    nearest, distances, reached = np.zeros(n, np.int64), np.full(n, np.inf, matrix.dtype), np.zeros(n, matrix.dtype)
    least, apart, newest = np.empty(LANES, matrix.dtype), np.empty(LANES, np.int32), 0
    for edge in range(n - 1):
        reached[newest] = FAR
        row = matrix[newest]
        for k in range(n):
            nearest[k] = newest if row[k] < distances[k] else nearest[k]
            distances[k] = min(row[k], distances[k])
        newest = _nearest(distances, reached, 0, least, apart)
        sources[edge], targets[edge], lengths[edge] = nearest[newest], newest, distances[newest]


@_compiled
def _join_edges(
    orders: Array, sources: Array, targets: Array, lengths: Array, parents: Array, heights: Array, rounds: Array
) -> None:
    """From the shortest edge on, the later first token joins the earlier."""
    for item in range(len(parents)):
        roots = np.arange(parents.shape[1])
        parents[item], heights[item], rounds[item] = roots, np.inf, 0
        for number, edge in enumerate(orders[item]):
            a, b = _root(roots, sources[item, edge]), _root(roots, targets[item, edge])
            into, absorbed = min(a, b), max(a, b)
            roots[absorbed] = into
            parents[item, absorbed], heights[item, absorbed] = into, lengths[item, edge]
            rounds[item, absorbed] = number


@njit(nogil=True)
def _root(roots: Array, token: int) -> int:
    """Follow the chain of `roots` to its end, halving it on the way."""
    while roots[token] != token:
        roots[token] = roots[roots[token]]
        token = roots[token]
    return token
