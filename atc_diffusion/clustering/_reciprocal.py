"""The loops that Numba compiles, of all linkages; a round joins every pair of clusters that are each other's nearest.

All of them are in this file: Numba compiles a cached function again when its own file changes, and no other.
"""

from typing import Any, NamedTuple

import numpy as np
from numba import njit

Array = np.ndarray[Any, np.dtype[Any]]

CODES = {"average": 0, "complete": 1, "single": 2, "ward": 3}  # numbers, so that LLVM tests them once per loop
AVERAGE, COMPLETE, SINGLE = CODES["average"], CODES["complete"], CODES["single"]
RESCANS = 8  # stale clusters per merge above which the search is thrifty
UNREACHABLE = 3e38  # beyond every distance, and finite in float32, so that a distance can be added to it
LANES = 64  # independent comparisons, which LLVM turns into vector instructions

# NumPy's rule for division by zero: Python's raises, and the test for it keeps loops from becoming vector instructions.
compiled = njit(nogil=True, error_model="numpy")


class _Clusters(NamedTuple):
    """State of each cluster, `[N]`, at the index of its first token."""

    sizes: Array
    formed: Array  # height at which it was formed
    bounds: Array  # least possible distance to any other cluster
    neighbours: Array  # the nearest cluster
    stale: Array  # whether that neighbour may be out of date
    grown: Array  # the last round in which it absorbed another
    gone: Array  # UNREACHABLE for clusters that were absorbed or will not merge again, otherwise 0
    least: Array  # scratch space for `_nearest`
    apart: Array


class _Pairs(NamedTuple):
    """The clusters that are joined in one round."""

    first: Array
    second: Array
    distances: Array


def merge_reciprocal(
    linkage: int, num_merges: int, matrices: Array, parents: Array, heights: Array, rounds: Array
) -> None:
    """Join reciprocal pairs until no distance is left below the `num_merges`-th smallest height.

    Writes `parents`, `heights` and `rounds` `[B, N]`, and over the distances `matrices` `[B, N, N]`.
    """
    for item in range(len(matrices)):
        _merge_one(linkage, num_merges, matrices[item], parents[item], heights[item], rounds[item])


@compiled
def _merge_one(linkage: int, num_merges: int, matrix: Array, parents: Array, heights: Array, rounds: Array) -> None:
    n, dtype = len(matrix), matrix.dtype
    clusters = _Clusters(
        np.ones(n, dtype),
        np.full(n, -UNREACHABLE, dtype),
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
        last = _smallest(heights, num_merges - 1) if merged >= num_merges else UNREACHABLE
        active = _drop(clusters, active, last)
        _join(linkage, matrix, clusters, active, pairs)
        if linkage == SINGLE:
            _follow(clusters, active, parents)
        thrifty = _mark_stale(clusters, active, number, linkage) > RESCANS * len(pairs.first)
        number += 1


@compiled
def _search(matrix: Array, clusters: _Clusters, active: Array, thrifty: bool) -> None:
    """Find the nearest neighbours of stale clusters; if `thrifty`, only of those that may be in the closest pair.

    If one cluster is the neighbour of most others and grows by one at a time, all of them become stale in every round.
    """
    limit = np.inf
    for i in active:
        if thrifty and not clusters.stale[i]:
            limit = min(limit, clusters.bounds[i])
    for i in active:
        if clusters.stale[i] and clusters.bounds[i] <= limit:
            clusters.gone[i] = UNREACHABLE
            clusters.neighbours[i] = _nearest(matrix[i], clusters.gone, i, clusters.least, clusters.apart)
            clusters.gone[i] = 0
            clusters.bounds[i] = matrix[i, clusters.neighbours[i]]
            clusters.stale[i] = False


@compiled
def _nearest(distances: Array, gone: Array, i: int, least: Array, apart: Array) -> int:
    """The nearest cluster that is not gone; of equally near ones, the one with the smallest i XOR j.

    XOR is symmetric, so equal tokens form pairs instead of all choosing the same one.

    Args:
        distances: `[N]`, from `i` to all clusters.
        gone: `[N]`, 0 or `UNREACHABLE`.
        i: the cluster whose neighbour is searched.
        least: scratch space for `LANES` distances.
        apart: scratch space for `LANES` int32.
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


@compiled
def _pair(matrix: Array, clusters: _Clusters, active: Array) -> _Pairs:
    """The reciprocal pairs. Rounding may leave none, so the closest pair is always included."""
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


@compiled
def _record(clusters: _Clusters, pairs: _Pairs, number: int, parents: Array, heights: Array, rounds: Array) -> None:
    for pair in range(len(pairs.first)):
        into, absorbed = pairs.first[pair], pairs.second[pair]
        formed = max(clusters.formed[into], clusters.formed[absorbed])
        height = max(min(clusters.bounds[into], clusters.bounds[absorbed]), formed)
        parents[absorbed], heights[absorbed], rounds[absorbed] = into, height, number
        clusters.formed[into] = clusters.bounds[into] = height
        clusters.grown[into] = number
        clusters.stale[into], clusters.gone[absorbed] = True, UNREACHABLE


@compiled
def _smallest(values: Array, k: int) -> float:
    """The value at index `k` in sorted order (Hoare's quickselect; NumPy's takes five seconds to compile)."""
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


@compiled
def _drop(clusters: _Clusters, active: Array, last: float) -> Array:
    """The active clusters that may still merge below height `last`."""
    count = 0
    for i in active:
        if clusters.bounds[i] >= last:
            clusters.gone[i] = UNREACHABLE
        if clusters.gone[i] == 0:
            active[count] = i
            count += 1
    return active[:count]


@compiled
def _follow(clusters: _Clusters, active: Array, parents: Array) -> None:
    """A union is as near as the nearer of its parts: with single linkage the nearest neighbour stays it when it grows.

    So when a cluster grows by one token, as they do there, those near it need not search again.
    """
    for i in active:
        clusters.neighbours[i] = parents[clusters.neighbours[i]]


@compiled
def _mark_stale(clusters: _Clusters, active: Array, number: int, linkage: int) -> int:
    """Mark clusters whose neighbour is gone or has grown, and count the stale ones."""
    count = 0
    for i in active:
        neighbour = clusters.neighbours[i]
        if clusters.gone[neighbour] > 0 or (linkage != SINGLE and clusters.grown[neighbour] == number):
            clusters.stale[i] = True
        count += clusters.stale[i]
    return count


@compiled
def _join(linkage: int, matrix: Array, clusters: _Clusters, active: Array, pairs: _Pairs) -> None:
    """Update distances to the unions: first the rows of all pairs, then their columns, in memory order."""
    sizes = clusters.sizes
    for pair in range(len(pairs.first)):
        i, j, d_ij = pairs.first[pair], pairs.second[pair], pairs.distances[pair]
        if clusters.gone[i] == 0:
            row, other, n_i, n_j = matrix[i], matrix[j], sizes[i], sizes[j]
            for k in range(len(row)):
                row[k] = _update(linkage, row[k], other[k], d_ij, n_i, n_j, sizes[k])
    for pair in range(len(pairs.first)):
        sizes[pairs.first[pair]] += sizes[pairs.second[pair]]
    for k in active:
        row = matrix[k]
        for pair in range(len(pairs.first)):
            i, j, d_ij = pairs.first[pair], pairs.second[pair], pairs.distances[pair]
            row[i] = _update(linkage, row[i], row[j], d_ij, sizes[i] - sizes[j], sizes[j], sizes[k])


@compiled
def _update(linkage: int, d_ki: float, d_kj: float, d_ij: float, n_i: float, n_j: float, n_k: float) -> float:
    """How far a cluster k is from the union of i and j; of Ward's linkage, squared."""
    if linkage == AVERAGE:
        return d_ki + (d_kj - d_ki) * (n_j / (n_i + n_j))
    if linkage == COMPLETE:
        return max(d_ki, d_kj)
    if linkage == SINGLE:
        return min(d_ki, d_kj)
    return ((n_i + n_k) * d_ki + (n_j + n_k) * d_kj - n_k * d_ij) / (n_i + n_j + n_k)
