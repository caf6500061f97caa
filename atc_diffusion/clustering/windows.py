"""Clustering in windows: tokens of different windows are never joined."""

import torch
from torch import Tensor

from atc_diffusion.clustering import cluster_tree
from atc_diffusion.clustering.tree import ClusterTree


@torch.library.custom_op("atc_diffusion::agglomerate_windows", mutates_args=())
def agglomerate_windows(
    tokens: Tensor, num_clusters: int, height: int, width: int, window: int, linkage: str, backend: str | None
) -> Tensor:
    """Label tokens as `agglomerate` does, as if those of different windows were infinitely far apart.

    Every window is clustered on its own, and the merges of all of them are done in the order of their heights: so
    flat windows keep fewer clusters than others, and there are `num_clusters` in all.

    Args:
        tokens: `[B, N, C]`, the rows of a grid of `height` x `width` tokens one after the other.
        num_clusters: no fewer than there are windows (`num_windows`).
        window: longest side of a window; the grid is divided as evenly as can be.
        linkage: as in `agglomerate`, over its default metric.
        backend: as in `agglomerate`.

    Returns:
        Labels `[B, N]` int64 in `0..num_clusters - 1`.
    """
    tree = _tree(tokens.detach(), _windows(height, width, window, tokens.device), linkage, backend)
    return tree.cut(num_clusters)


@agglomerate_windows.register_fake
def _(
    tokens: Tensor, num_clusters: int, height: int, width: int, window: int, linkage: str, backend: str | None
) -> Tensor:
    return tokens.new_empty(tokens.shape[:2], dtype=torch.int64)


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
    parents = torch.empty(tokens.shape[:2], dtype=torch.int64, device=tokens.device)
    ranks, heights = torch.empty_like(parents), tokens.new_empty(tokens.shape[:2], dtype=torch.float64)
    for tiles in windows:
        tree = cluster_tree(tokens[:, tiles].flatten(0, 1), linkage, backend=backend)
        of_all = tiles.repeat(len(tokens), 1)
        index = tiles.flatten()
        parents[:, index] = of_all.gather(1, tree.parents).reshape(len(tokens), -1)
        heights[:, index] = tree.heights.double().reshape(len(tokens), -1)
        ranks[:, index] = tree.order.argsort(dim=1).reshape(len(tokens), -1)
    return ClusterTree.from_merges(parents, heights, ranks, num_clusters=sum(map(len, windows)))
