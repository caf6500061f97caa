"""Assignment of tokens to their nearest centres, which K-Medoids and DPC-KNN share."""

import torch
from torch import Tensor


def euclidean_distances(tokens: Tensor) -> Tensor:
    """Distances `[B, N, N]` between tokens `[B, N, C]`, exactly symmetric, so that rounding breaks no tie."""
    distances = torch.cdist(tokens, tokens)
    distances = (distances + distances.mT) / 2
    distances.diagonal(dim1=1, dim2=2).zero_()
    return distances


def join_nearest(distances: Tensor, centers: Tensor) -> Tensor:
    """The centre `[B, N]` that every token joins; a centre always joins itself, so that no cluster is empty.

    Args:
        distances: `[B, N, N]` between tokens.
        centers: `[B, K]` int64, distinct tokens.
    """
    to_centers = distances.gather(2, centers[:, None].expand(-1, distances.shape[1], -1))
    nearest = centers.gather(1, to_centers.argmin(dim=2))
    return nearest.scatter(1, centers, centers)
