"""Clustering in windows: tokens of different windows are never joined."""

import torch
from torch import Tensor

from atc_diffusion.clustering import cluster_tree
from atc_diffusion.clustering.tree import ClusterTree


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
    return _tree(tokens.detach(), _windows(*grid, window, tokens.device), linkage, backend)


def num_windows(height: int, width: int, window: int) -> int:
    """How many windows of sides up to `window` a grid is divided into."""
    return -(-height // window) * -(-width // window)


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
    ranks, heights = torch.zeros_like(parents), tokens.new_zeros(tokens.shape[:2], dtype=torch.float64)
    for tiles in windows:
        tree = cluster_tree(tokens[:, tiles].flatten(0, 1), linkage, backend=backend)
        of_all = tiles.repeat(len(tokens), 1)
        index = tiles.flatten()
        parents[:, index] = of_all.gather(1, tree.parents).reshape(len(tokens), -1)
        heights[:, index] = tree.heights.double().reshape(len(tokens), -1)
        ranks[:, index] = tree.order.argsort(dim=1).reshape(len(tokens), -1)
    return ClusterTree.from_merges(parents, heights, ranks, num_clusters=sum(map(len, windows)))
