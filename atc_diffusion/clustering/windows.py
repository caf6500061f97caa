"""Clustering in windows: tokens of different windows are never joined."""

from dataclasses import replace

import torch
from torch import Tensor

from atc_diffusion.clustering import check_choices, cluster_tree
from atc_diffusion.clustering.placement import place
from atc_diffusion.clustering.tree import ClusterTree, is_traced


def cluster_windows(
    tokens: Tensor, grid: tuple[int, int], window: int, linkage: str = "average", backend: str | None = None
) -> ClusterTree:
    """Cluster tokens as `cluster_tree` does, as if those of different windows were infinitely far apart.

    Every window is clustered on its own, and the merges of all of them are ordered by height: flat windows keep fewer
    clusters than others.

    Args:
        tokens: `[B, N, C]`, the rows of the grid one after the other.
        grid: height and width; their product is `N`.
        window: longest side of a window; the grid is divided as evenly as possible.
        linkage: as in `agglomerate`, over its default metric.
        backend: as in `agglomerate`.

    Returns:
        A tree that can be cut down to one cluster per window (`num_windows`).
    """
    tokens, origin = tokens.detach(), tokens.device
    if not is_traced(tokens):  # all windows travel together
        largest = tokens[:, : _longest_side(grid[0], window) * _longest_side(grid[1], window)]
        tokens = tokens.to(place(largest, linkage, check_choices(linkage), backend).device)
    return replace(_tree(tokens, _windows(*grid, window, tokens.device), linkage, backend), device=origin)


def num_windows(height: int, width: int, window: int) -> int:
    """How many windows of sides up to `window` a grid is divided into."""
    return -(-height // window) * -(-width // window)


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


def _tree(tokens: Tensor, windows: list[Tensor], linkage: str, backend: str | None) -> ClusterTree:
    """The trees of all windows as one."""
    parents = torch.zeros(tokens.shape[:2], dtype=torch.int64, device=tokens.device)
    ranks = torch.zeros_like(parents)
    heights = torch.zeros_like(parents, dtype=torch.promote_types(tokens.dtype, torch.float32))
    for tiles in windows:
        tree = cluster_tree(tokens[:, tiles].flatten(0, 1), linkage, backend=backend)
        of_all = tiles.repeat(len(tokens), 1)
        index = tiles.flatten()
        parents[:, index] = of_all.gather(1, tree.parents).reshape(len(tokens), -1)
        heights[:, index] = tree.heights.reshape(len(tokens), -1)
        ranks[:, index] = tree.order.argsort(dim=1).reshape(len(tokens), -1)
    return ClusterTree.from_merges(parents, heights, ranks, num_clusters=sum(map(len, windows)))
