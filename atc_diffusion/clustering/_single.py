"""Single linkage by the minimum spanning tree (Gower & Ross 1969), one problem at a time, on the host.

If features are smooth, clusters grow by one token at a time, and reciprocal merging would take hundreds of rounds.
"""

import numpy as np
import torch
from torch import Tensor

from atc_diffusion.clustering.tree import ClusterTree


def build_tree(distances: Tensor) -> ClusterTree:
    """The whole tree from `distances` `[B, N, N]`."""
    trees = [_join(*_spanning_tree(item)) for item in distances.cpu().numpy()]
    parents, heights, rounds = (torch.from_numpy(np.stack(x)).to(distances.device) for x in zip(*trees, strict=True))
    return ClusterTree.from_merges(parents, heights, rounds)


def _spanning_tree(distances: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Both ends and the length `[N - 1]` of the tree's edges, by Prim's algorithm."""
    num_tokens = len(distances)
    sources, targets = np.zeros(num_tokens, dtype=np.int64), np.empty(num_tokens - 1, dtype=np.int64)
    lengths = np.full(num_tokens, np.inf, dtype=distances.dtype)  # from the tree to each token outside it
    reached = np.zeros(num_tokens, dtype=distances.dtype)  # infinite for tokens inside it
    found, newest = np.empty(num_tokens - 1, dtype=distances.dtype), 0
    for step in range(num_tokens - 1):
        lengths[newest] = reached[newest] = np.inf
        row = distances[newest] + reached
        nearer = row < lengths
        np.copyto(lengths, row, where=nearer)
        np.copyto(sources, newest, where=nearer)
        newest = int(lengths.argmin())
        targets[step], found[step] = newest, lengths[newest]
    return sources[targets], targets, found


def _join(sources: np.ndarray, targets: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Parents, heights and rounds `[N]`; edges are taken by length, and the later first token joins the earlier."""
    num_tokens = len(lengths) + 1
    roots = list(range(num_tokens))
    parents, heights = np.arange(num_tokens), np.full(num_tokens, np.inf, dtype=lengths.dtype)
    rounds = np.zeros(num_tokens, dtype=np.int64)
    order = lengths.argsort(kind="stable")
    for number, (edge, a, b) in enumerate(zip(order, sources[order].tolist(), targets[order].tolist(), strict=True)):
        into, absorbed = sorted((_root(roots, a), _root(roots, b)))
        roots[absorbed] = into
        parents[absorbed], heights[absorbed], rounds[absorbed] = into, lengths[edge], number
    return parents, heights, rounds


def _root(roots: list[int], token: int) -> int:
    """Follow the chain of `roots` to its end, halving it on the way."""
    while roots[token] != token:
        roots[token] = token = roots[roots[token]]
    return token
