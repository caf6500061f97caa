"""Baselines: bipartite matching as in Token Merging, K-Medoids and DPC-KNN."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from atc_diffusion.clustering import check_tokens
from atc_diffusion.clustering._clusters import finite
from atc_diffusion.clustering.tree import check_num_clusters, number_clusters
from atc_diffusion.devices import is_traced
from atc_diffusion.validation import check_count, check_not_negative


@dataclass(frozen=True, eq=False)
class Matching:
    """The destination that each source joins, most similar pairs first.

    Attributes:
        sources: `[B, S]` int64, the tokens that may be absorbed, by decreasing similarity to their destination.
        destinations: `[B, S]` int64, the destination of each source.
        num_clusters: the smallest possible number of clusters, which is the number of destinations.
    """

    sources: Tensor
    destinations: Tensor
    num_clusters: int

    def cut(self, num_clusters: int) -> Tensor:
        """Labels `[B, N]` of `num_clusters` clusters, numbered by first token. Finer cuts refine coarser ones.

        Raises:
            ValueError: if there are fewer tokens, or more destinations.
        """
        num_tokens = self.sources.shape[1] + self.num_clusters
        check_num_clusters(num_clusters, num_tokens)
        if num_clusters < self.num_clusters:
            raise ValueError(
                f"each of {self.num_clusters} destinations is a cluster, got num_clusters={num_clusters}; ask for more"
                " clusters or give fewer destinations"
            )
        merged = slice(num_tokens - num_clusters)
        roots = torch.arange(num_tokens, device=self.sources.device).expand(len(self.sources), -1)
        return number_clusters(roots.scatter(1, self.sources[:, merged], self.destinations[:, merged]))


def match(tokens: Tensor, destinations: Tensor) -> Matching:
    """Pair every token that is not a destination with the most similar destination (cosine).

    Args:
        tokens: `[B, N, C]`.
        destinations: `[D]` int64, distinct indices of the tokens that others may join.
    """
    is_source = torch.ones(tokens.shape[1], dtype=torch.bool, device=tokens.device).scatter(0, destinations, False)
    # A stable sort instead of nonzero keeps the shape static.
    sources = is_source.sort(descending=True, stable=True).indices[: tokens.shape[1] - len(destinations)]
    units = F.normalize(finite(tokens.detach().float()), dim=2)
    similarity, nearest = (units[:, sources] @ units[:, destinations].mT).max(dim=2)
    order = similarity.sort(dim=1, descending=True, stable=True).indices
    return Matching(sources[order], destinations[nearest.gather(1, order)], len(destinations))


def bipartite_labels(tokens: Tensor, num_clusters: int, destinations: Tensor) -> Tensor:
    """Label every token with its cluster by one bipartite matching (Bolya & Hoffman 2023, section 3).

    Every token that is not a destination is a source. The sources most similar to a destination (cosine) join it.

    Args:
        tokens: `[B, N, C]`.
        num_clusters: `K`, from `D` to `N`.
        destinations: `[D]` int64, distinct indices of the tokens that others may join.

    Returns:
        Labels `[B, N]` int64 in `0..num_clusters - 1`, clusters numbered by their first token.

    Raises:
        ValueError: for tokens, destinations or a number of clusters that do not fit.

    Example:
        >>> tokens = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.9, 0.1], [0.5, 0.6]]])
        >>> bipartite_labels(tokens, num_clusters=3, destinations=torch.tensor([0, 1]))
        tensor([[0, 1, 0, 2]])
    """
    check_tokens(tokens)
    check_num_clusters(num_clusters, tokens.shape[1])
    _check_destinations(destinations, tokens.shape[1])
    return match(tokens, destinations).cut(num_clusters)


def _check_destinations(destinations: Tensor, num_tokens: int) -> None:
    if not isinstance(destinations, Tensor) or destinations.ndim != 1 or destinations.dtype != torch.int64:
        given = [destinations.dtype, list(destinations.shape)] if isinstance(destinations, Tensor) else [destinations]
        raise ValueError(f"destinations must be an int64 tensor [D], got {' '.join(map(str, given))}")
    if not len(destinations):
        raise ValueError("destinations must name at least one token, got none")
    if is_traced(destinations):
        return
    numbers = destinations.tolist()
    if not 0 <= min(numbers) <= max(numbers) < num_tokens or len(set(numbers)) < len(numbers):
        raise ValueError(f"destinations must be distinct tokens from 0 to {num_tokens - 1}, got {numbers}")


def draw_destinations(height: int, width: int, stride: int, seed: int, step: Tensor) -> Tensor:
    """Draw one token of every complete `stride` x `stride` cell of the grid, `[D]` int64.

    The draw depends only on the cell, `seed` and `step` (a scalar tensor), so images do not depend on earlier ones.

    Raises:
        ValueError: if the grid is smaller than one cell.
    """
    if min(height, width) < stride:
        raise ValueError(
            f"ToMe's stride of {stride} is larger than the grid of {height} x {width} tokens; draw a larger image or"
            " use a smaller stride"
        )
    rows, columns = height // stride, width // stride
    cells = torch.arange(rows * columns, device=step.device)
    choice = _hash(_hash(_hash(step.long()) + seed) + cells) % stride**2
    y = (cells // columns) * stride + choice // stride
    x = (cells % columns) * stride + choice % stride
    return y * width + x


def _hash(x: Tensor) -> Tensor:
    """Mix 32 bits with the finaliser of MurmurHash3, in int64 so that the sign bit is never reached."""
    for multiplier, shift in ((0x85EBCA6B, 16), (0x62B2AE35, 13), (1, 16)):
        x = (x ^ (x >> shift)) * multiplier & 0xFFFFFFFF
    return x


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
        Labels `[B, N]` int64 in `0..num_clusters - 1`, clusters numbered by their first token.

    Raises:
        ValueError: for tokens, weights or a number of clusters or iterations that do not fit.

    Example:
        >>> kmedoids_labels(torch.tensor([[[0.0], [5.0], [1.0], [6.0]]]), num_clusters=2)
        tensor([[0, 1, 0, 1]])
    """
    check_tokens(tokens)
    check_num_clusters(num_clusters, tokens.shape[1])
    check_not_negative("iterations", iterations)
    if weights is not None and weights.shape != tokens.shape[:2]:
        raise ValueError(f"weights must be a tensor {list(tokens.shape[:2])}, got {list(weights.shape)}")
    distances = _distances(tokens)
    importance = -_centrality(distances) if weights is None else weights.detach().float().nan_to_num()
    costs = distances if weights is None else distances * importance[:, None]
    medoids = importance.sort(dim=1, descending=True, stable=True).indices[:, :num_clusters]
    for _ in range(iterations):
        medoids = _move(costs, _join_nearest(distances, medoids), medoids)
    return number_clusters(_join_nearest(distances, medoids))


def _centrality(distances: Tensor) -> Tensor:
    """Sum `[B, N]` of each token's normalised distances; central tokens have small sums (Park & Jun 2009, Eq. 3)."""
    return (distances / distances.sum(dim=1, keepdim=True).clamp(min=1e-12)).sum(dim=2)  # 0 / 0 is 0


def _move(costs: Tensor, roots: Tensor, medoids: Tensor) -> Tensor:
    """The member `[B, K]` of each cluster with the smallest sum of `costs` `[B, N, N]` to the other members."""
    together = roots[:, :, None] == roots[:, None]
    totals = (costs * together).sum(dim=2).nan_to_num()  # finite, so that every member precedes all others
    is_member = roots[:, None] == medoids[:, :, None]
    return totals[:, None].masked_fill(~is_member, torch.inf).argmin(dim=2)


def dpc_knn_labels(tokens: Tensor, num_clusters: int, neighbors: int = 5) -> Tensor:
    """Label every token with its cluster by DPC-KNN (Du et al. 2016), as TCFormer does (Zeng et al. 2022, Eqs. 1-3).

    Centres are dense tokens that are far from any denser one; all others join the nearest centre (Euclidean distance).
    TCFormer breaks ties of density with random noise; here the earlier token counts as denser.

    Args:
        tokens: `[B, N, C]`.
        num_clusters: `K`, from 1 to `N`.
        neighbors: how many nearest tokens, itself included, determine a token's density.

    Returns:
        Labels `[B, N]` int64 in `0..num_clusters - 1`, clusters numbered by their first token.

    Raises:
        ValueError: for tokens or a number of clusters or neighbours that do not fit.

    Example:
        >>> dpc_knn_labels(torch.tensor([[[0.0], [5.0], [1.0], [6.0]]]), num_clusters=2, neighbors=2)
        tensor([[0, 1, 0, 1]])
    """
    check_tokens(tokens)
    check_num_clusters(num_clusters, tokens.shape[1])
    check_count("neighbors", neighbors, "a whole number from 1 up")
    distances = _distances(tokens) / max(tokens.shape[2], 1) ** 0.5
    density = _density(distances, min(neighbors, tokens.shape[1]))
    scores = density * _separation(distances, density)
    centers = scores.sort(dim=1, descending=True, stable=True).indices[:, :num_clusters]
    return number_clusters(_join_nearest(distances, centers))


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


def _distances(tokens: Tensor) -> Tensor:
    """Euclidean distances `[B, N, N]`, finite and exactly symmetric, so that rounding breaks no tie."""
    tokens = finite(tokens.detach().float())
    distances = torch.cdist(tokens, tokens)
    distances = (distances + distances.mT) / 2
    return distances.masked_fill(torch.eye(tokens.shape[1], dtype=torch.bool, device=tokens.device), 0)


def _join_nearest(distances: Tensor, centers: Tensor) -> Tensor:
    """The centre `[B, N]` that every token joins; a centre always joins itself, so that no cluster is empty.

    Args:
        distances: `[B, N, N]` between tokens.
        centers: `[B, K]` int64, distinct tokens.
    """
    to_centers = distances.gather(2, centers[:, None].expand(-1, distances.shape[1], -1))
    nearest = centers.gather(1, to_centers.argmin(dim=2))
    return nearest.scatter(1, centers, centers)
