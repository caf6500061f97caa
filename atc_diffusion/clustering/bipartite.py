"""Bipartite matching: Token Merging for Stable Diffusion (Bolya & Hoffman 2023, section 3)."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


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
        """Labels `[B, N]` of `num_clusters` clusters, numbered by first token. Finer cuts refine coarser ones."""
        num_tokens = self.sources.shape[1] + self.num_clusters
        merged = slice(num_tokens - num_clusters)
        roots = torch.arange(num_tokens, device=self.sources.device).repeat(len(self.sources), 1)
        roots.scatter_(1, self.sources[:, merged], self.destinations[:, merged])
        return number_clusters(roots)


def match(tokens: Tensor, destinations: Tensor) -> Matching:
    """Pair every token that is not a destination with the most similar destination (cosine).

    Args:
        tokens: `[B, N, C]`.
        destinations: `[D]` int64, indices of the tokens that others may join.
    """
    is_source = torch.ones(tokens.shape[1], dtype=torch.bool, device=tokens.device)
    is_source.scatter_(0, destinations, False)
    # A stable sort instead of nonzero keeps the shape static.
    sources = is_source.sort(descending=True, stable=True).indices[: tokens.shape[1] - len(destinations)]
    units = F.normalize(tokens.detach().float(), dim=2)
    similarity, nearest = (units[:, sources] @ units[:, destinations].mT).max(dim=2)
    order = similarity.sort(dim=1, descending=True, stable=True).indices
    return Matching(sources[order], destinations[nearest.gather(1, order)], len(destinations))


def bipartite_labels(tokens: Tensor, destinations: Tensor, num_clusters: int) -> Tensor:
    """Label every token with its cluster by one bipartite matching (Bolya & Hoffman 2023, section 3).

    Every token that is not a destination is a source. The sources most similar to a destination (cosine) join it.

    Args:
        tokens: `[B, N, C]`.
        destinations: `[D]` int64, indices of the tokens that others may join.
        num_clusters: from `D` to `N`.

    Returns:
        Labels `[B, N]` int64, clusters numbered by their first token.
    """
    return match(tokens, destinations).cut(num_clusters)


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


def number_clusters(roots: Tensor) -> Tensor:
    """Labels `[B, N]`, numbered by first token; tokens with the same entry of `roots` `[B, N]` share a cluster."""
    tokens = torch.arange(roots.shape[1], device=roots.device).expand_as(roots)
    first = torch.full_like(roots, roots.shape[1]).scatter_reduce_(1, roots, tokens, "amin").gather(1, roots)
    numbers = (first == tokens).cumsum(dim=1) - 1
    return numbers.gather(1, first)
