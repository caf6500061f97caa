"""Density-peak clustering with nearest neighbours (DPC-KNN), a baseline."""

import torch
from torch import Tensor

from atc_diffusion.clustering._centers import euclidean_distances, join_nearest
from atc_diffusion.clustering.bipartite import number_clusters


def dpc_knn_labels(tokens: Tensor, num_clusters: int, neighbors: int = 5) -> Tensor:
    """Label every token with its cluster by DPC-KNN (Du et al. 2016), as TCFormer does (Zeng et al. 2022, Eqs. 1-3).

    Centres are dense tokens that are far from any denser one; all others join the nearest centre (Euclidean distance).
    TCFormer breaks ties of density with random noise; here the earlier token counts as denser.

    Args:
        tokens: `[B, N, C]`.
        num_clusters: `K`, from 1 to `N`.
        neighbors: how many nearest tokens, itself included, determine a token's density.

    Returns:
        Labels `[B, N]` int64, clusters numbered by their first token.

    Example:
        >>> dpc_knn_labels(torch.tensor([[[0.0], [5.0], [1.0], [6.0]]]), num_clusters=2, neighbors=2)
        tensor([[0, 1, 0, 1]])
    """
    distances = euclidean_distances(tokens.detach().float()) / tokens.shape[2] ** 0.5
    density = _density(distances, min(neighbors, tokens.shape[1]))
    scores = density * _separation(distances, density)
    centers = scores.sort(dim=1, descending=True, stable=True).indices[:, :num_clusters]
    return number_clusters(join_nearest(distances, centers))


def _density(distances: Tensor, neighbors: int) -> Tensor:
    nearest = distances.topk(neighbors, dim=2, largest=False).values
    return (-(nearest**2).mean(dim=2)).exp()


def _separation(distances: Tensor, density: Tensor) -> Tensor:
    """Distance `[B, N]` from the nearest denser token; for the densest, the largest distance there is."""
    order = density.argsort(dim=1, descending=True, stable=True)
    rank = order.argsort(dim=1)
    is_denser = rank[:, None] < rank[:, :, None]
    farthest = distances.amax(dim=(1, 2))[:, None, None]
    return torch.where(is_denser, distances, farthest).amin(dim=2)
