"""The reference backend: SciPy, one problem at a time, on the CPU."""

import numpy as np
import torch
from torch import Tensor

from atc_diffusion.clustering._clusters import cosine_distances, prepare
from atc_diffusion.clustering.tree import ClusterTree


def build_tree(tokens: Tensor, num_clusters: int, linkage: str, metric: str, together: int = 1) -> ClusterTree:
    """Cluster `tokens` `[B, N, C]` (`[B, N, N]` if precomputed) down to one cluster, whatever `num_clusters` is."""
    from scipy.cluster import hierarchy

    # SciPy raises for a single token.
    merges = hierarchy.linkage if tokens.shape[1] > 1 else lambda d, linkage: np.empty((0, 4))
    trees = [_replay(merges(d, linkage)) for d in _condensed(prepare(tokens, metric).double().cpu(), metric)]
    parents, heights, rounds = (torch.from_numpy(np.stack(x)).to(tokens.device) for x in zip(*trees, strict=True))
    return ClusterTree.from_merges(parents, heights.to(tokens.dtype), rounds)


def _condensed(tokens: Tensor, metric: str) -> np.ndarray:
    """The upper triangles of the distances, `[B, N (N - 1) / 2]` in float64."""
    if metric == "cosine":
        tokens = cosine_distances(tokens, tokens)
    elif metric == "euclidean":
        tokens = torch.cdist(tokens, tokens, compute_mode="donot_use_mm_for_euclid_dist")
    rows, columns = torch.triu_indices(tokens.shape[1], tokens.shape[1], offset=1)
    return tokens[:, rows, columns].numpy()


def _replay(merges: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Parents, heights and rounds `[N]` from SciPy's `[N - 1, 4]` merges; the later first token joins the earlier."""
    num_tokens = len(merges) + 1
    parents, heights, rounds = np.arange(num_tokens), np.full(num_tokens, np.inf), np.zeros(num_tokens, dtype=np.int64)
    first_tokens = list(range(num_tokens))
    for number, (a, b, height, _) in enumerate(merges):
        into, absorbed = sorted((first_tokens[int(a)], first_tokens[int(b)]))
        parents[absorbed], heights[absorbed], rounds[absorbed] = into, height, number
        first_tokens.append(into)
    return parents, heights, rounds
