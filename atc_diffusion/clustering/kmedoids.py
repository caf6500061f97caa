"""K-Medoids clustering, a baseline."""

import torch
from torch import Tensor

from atc_diffusion.clustering._centers import euclidean_distances, join_nearest
from atc_diffusion.clustering.bipartite import number_clusters


def kmedoids_labels(tokens: Tensor, num_clusters: int, weights: Tensor | None = None, iterations: int = 5) -> Tensor:
    """Label every token with its cluster by K-Medoids (Park & Jun 2009), as Haurum et al. 2023 use it.

    Every token joins the nearest medoid (Euclidean distance); then every cluster's new medoid is the member with the
    smallest weighted sum of distances from the members.

    Args:
        tokens: `[B, N, C]`.
        num_clusters: `K`, from 1 to `N`.
        weights: `[B, N]`, positive; the heaviest tokens are the initial medoids. Haurum et al. use the attention that a
            token receives. None weighs all the same and starts from the most central tokens.
        iterations: how many times the medoids are updated.

    Returns:
        Labels `[B, N]` int64, clusters numbered by their first token.

    Example:
        >>> kmedoids_labels(torch.tensor([[[0.0], [5.0], [1.0], [6.0]]]), num_clusters=2)
        tensor([[0, 1, 0, 1]])
    """
    distances = euclidean_distances(tokens.detach().float())
    importance = -_centrality(distances) if weights is None else weights.detach().float()
    costs = distances if weights is None else distances * importance[:, None]
    medoids = importance.sort(dim=1, descending=True, stable=True).indices[:, :num_clusters]
    for _ in range(iterations):
        medoids = _move(costs, join_nearest(distances, medoids), medoids)
    return number_clusters(join_nearest(distances, medoids))


def _centrality(distances: Tensor) -> Tensor:
    """Sum `[B, N]` of each token's normalised distances; central tokens have small sums (Park & Jun 2009, Eq. 3)."""
    return (distances / distances.sum(dim=1, keepdim=True).clamp(min=1e-12)).sum(dim=2)


def _move(costs: Tensor, roots: Tensor, medoids: Tensor) -> Tensor:
    """The member `[B, K]` of each cluster with the smallest sum of `costs` `[B, N, N]` to the other members."""
    together = roots[:, :, None] == roots[:, None]
    totals = (costs * together).sum(dim=2)
    is_member = roots[:, None] == medoids[:, :, None]
    return totals[:, None].masked_fill(~is_member, torch.inf).argmin(dim=2)
