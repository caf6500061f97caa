"""Single linkage by the minimum spanning tree, as in `_single.py`."""

import numpy as np

from atc_diffusion.clustering._numba.compiled import FAR, LANES, Array, entry, inner, nearest


def span(matrices: Array, parents: Array, heights: Array, rounds: Array) -> None:
    """Write parents, heights and rounds `[B, N]`, given distances `[B, N, N]`."""
    sources, targets, lengths = (np.zeros_like(array[:, 1:]) for array in (parents, parents, heights))
    _find_edges(matrices, sources, targets, lengths)
    _join_edges(lengths.argsort(axis=1, kind="stable"), sources, targets, lengths, parents, heights, rounds)


@entry
def _find_edges(matrices: Array, sources: Array, targets: Array, lengths: Array) -> None:
    """Both ends and the length `[B, N - 1]` of the spanning trees' edges, by Prim's algorithm."""
    for item in range(len(matrices)):
        _span_one(matrices[item], sources[item], targets[item], lengths[item])


@inner
def _span_one(matrix: Array, sources: Array, targets: Array, lengths: Array) -> None:
    n = len(matrix)
    origins, distances, reached = np.zeros(n, np.int64), np.full(n, np.inf, matrix.dtype), np.zeros(n, matrix.dtype)
    least, apart, newest = np.empty(LANES, matrix.dtype), np.empty(LANES, np.int32), 0
    for edge in range(n - 1):
        reached[newest] = FAR
        row = matrix[newest]
        for k in range(n):
            origins[k] = newest if row[k] < distances[k] else origins[k]
            distances[k] = min(row[k], distances[k])
        newest = nearest(distances, reached, 0, least, apart)
        sources[edge], targets[edge], lengths[edge] = origins[newest], newest, distances[newest]


@entry
def _join_edges(
    orders: Array, sources: Array, targets: Array, lengths: Array, parents: Array, heights: Array, rounds: Array
) -> None:
    """Take the edges by length; the later first token joins the earlier."""
    for item in range(len(parents)):
        roots = np.arange(parents.shape[1])
        parents[item], heights[item], rounds[item] = roots, np.inf, 0
        for number, edge in enumerate(orders[item]):
            a, b = _root(roots, sources[item, edge]), _root(roots, targets[item, edge])
            into, absorbed = min(a, b), max(a, b)
            roots[absorbed] = into
            parents[item, absorbed], heights[item, absorbed] = into, lengths[item, edge]
            rounds[item, absorbed] = number


@inner
def _root(roots: Array, token: int) -> int:
    """Follow the chain of `roots` to its end, halving it on the way."""
    while roots[token] != token:
        roots[token] = roots[roots[token]]
        token = roots[token]
    return token
