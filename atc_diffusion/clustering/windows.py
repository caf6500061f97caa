"""Clustering in windows: tokens of different windows are never joined."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from atc_diffusion.clustering import Merges, check_choices, check_tokens, find_merges
from atc_diffusion.clustering.placement import place
from atc_diffusion.clustering.tree import ClusterTree, check_num_clusters
from atc_diffusion.devices import is_traced


def cluster_windows(
    tokens: Tensor,
    num_clusters: int,
    grid: tuple[int, int],
    window: int,
    linkage: str = "average",
    backend: str | None = None,
) -> ClusterTree:
    """Cluster tokens as `cluster_tree` does, as if those of different windows were infinitely far apart.

    Every window is clustered on its own, and the merges of all of them are ordered by height: flat windows keep fewer
    clusters than others.

    Args:
        tokens: `[B, N, C]`, the rows of the grid one after the other.
        num_clusters: the least number of clusters that the tree will be asked for; more are cheaper.
        grid: height and width; their product is `N`.
        window: longest side of a window; the grid is divided as evenly as possible.
        linkage: as in `agglomerate`, over its default metric.
        backend: as in `agglomerate`.

    Returns:
        A tree that can be cut down to `num_clusters`, but not below one cluster per window.
    """
    metric = check_choices(linkage, backend=backend)
    check_tokens(tokens, metric, backend)
    check_num_clusters(num_clusters, tokens.shape[1])
    tokens, origin = tokens.detach(), tokens.device
    if not is_traced(tokens):  # all windows travel together
        largest = tokens[:, : _longest_side(grid[0], window) * _longest_side(grid[1], window)]
        backend, device = place(largest, linkage, metric, backend)
        tokens = tokens.to(device)
    find = partial(find_merges, linkage=linkage, metric=metric, backend=backend)
    return replace(_tree(tokens, num_clusters, _windows(*grid, window, tokens.device), find), device=origin)


def _longest_side(length: int, window: int) -> int:
    """Of the windows that a side of the grid is divided into."""
    return -(-length // -(-length // window))


def _windows(height: int, width: int, window: int, device: torch.device) -> list[Tensor]:
    """The tokens of every window, those of one shape in one tensor `[windows, tokens]`: at most four."""
    by_shape: dict[tuple[int, ...], list[Tensor]] = {}
    for band in torch.arange(height * width, device=device).view(height, width).tensor_split(-(-height // window)):
        for tile in band.tensor_split(-(-width // window), dim=1):
            by_shape.setdefault(tuple(tile.shape), []).append(tile.flatten())
    return [torch.stack(tiles) for tiles in by_shape.values()]


def _tree(tokens: Tensor, num_clusters: int, windows: list[Tensor], find: Callable[..., Merges]) -> ClusterTree:
    """The trees of all windows as one; windows of one shape need at most all the merges of the image."""
    batch, num_merges = len(tokens), tokens.shape[1] - num_clusters
    parts = []
    for tiles in windows:
        left = max(len(tiles), tiles.numel() - num_merges)
        parents, heights, order = find(tokens[:, tiles].flatten(0, 1), left, together=len(tiles))
        parts.append((tiles.repeat(batch, 1).gather(1, parents), heights, order.argsort(dim=1)))
    places = torch.cat([tiles.flatten() for tiles in windows]).argsort()
    parents, heights, ranks = (
        torch.cat([x.reshape(batch, -1) for x in each], dim=1)[:, places] for each in zip(*parts, strict=True)
    )
    return ClusterTree.from_merges(parents, heights, ranks, max(num_clusters, sum(map(len, windows))))
