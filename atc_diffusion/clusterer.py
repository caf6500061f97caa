"""Clusters tokens into a tree as the configuration says."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from atc_diffusion.baselines import DPCKNNConfig, KMedoidsConfig, ToMeConfig
from atc_diffusion.clustering import cluster_tree
from atc_diffusion.clustering.bipartite import draw_destinations, match
from atc_diffusion.clustering.dpc_knn import dpc_knn_labels
from atc_diffusion.clustering.kmedoids import kmedoids_labels
from atc_diffusion.clustering.tree import Cuttable
from atc_diffusion.clustering.windows import cluster_windows
from atc_diffusion.config import ATCConfig, MergeConfig

Grid = tuple[int, int]


def build_tree(config: MergeConfig, features: Tensor, grid: Grid, step: Tensor, num_clusters: int) -> Cuttable:
    """Cluster tokens by their `features` `[B, N, C]`.

    Args:
        config: the method and its options.
        features: vectors whose distances are clustered.
        grid: height and width of the tokens' grid; their product is `N`.
        step: scalar tensor, the denoising timestep.
        num_clusters: the smallest number of clusters that the tree will be cut to; fewer may be possible.
    """
    return _BUILDERS[type(config)](config, features, grid, step, num_clusters)


def _atc(config: ATCConfig, features: Tensor, grid: Grid, step: Tensor, num_clusters: int) -> Cuttable:
    if config.window_size is None or config.window_size >= max(grid):
        return cluster_tree(features, config.linkage, backend=config.backend, num_clusters=num_clusters)
    return cluster_windows(features, grid, config.window_size, config.linkage, config.backend, num_clusters)


def _tome(config: ToMeConfig, features: Tensor, grid: Grid, step: Tensor, num_clusters: int) -> Cuttable:
    return match(features, draw_destinations(*grid, config.stride, config.seed, step.to(features.device)))


@dataclass(frozen=True, eq=False)
class _Partitions:
    """Clusterings that do not nest: `labels` finds each number of clusters from scratch."""

    labels: Callable[..., Tensor]
    num_clusters: int = 1

    def cut(self, num_clusters: int) -> Tensor:
        return self.labels(num_clusters=num_clusters)


def _kmedoids(config: KMedoidsConfig, features: Tensor, grid: Grid, step: Tensor, num_clusters: int) -> Cuttable:
    return _Partitions(partial(kmedoids_labels, features, iterations=config.iterations))


def _dpc_knn(config: DPCKNNConfig, features: Tensor, grid: Grid, step: Tensor, num_clusters: int) -> Cuttable:
    return _Partitions(partial(dpc_knn_labels, features, neighbors=config.neighbors))


_BUILDERS: dict[type[MergeConfig], Callable[[Any, Tensor, Grid, Tensor, int], Cuttable]] = {
    ATCConfig: _atc,
    ToMeConfig: _tome,
    KMedoidsConfig: _kmedoids,
    DPCKNNConfig: _dpc_knn,
}
