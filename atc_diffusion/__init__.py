"""Faster Stable Diffusion by merging similar tokens: Agglomerative Token Clustering (ATC, ECCV 2024) for diffusers."""

from atc_diffusion.clustering import agglomerate, cluster_tree
from atc_diffusion.clustering.tree import ClusterTree
from atc_diffusion.config import ATCConfig, MergeConfig, ToMeConfig
from atc_diffusion.hooks import LayerSummary
from atc_diffusion.merge_map import MergeMap
from atc_diffusion.patch import Summary, apply_patch, patched, remove_patch, summary
from atc_diffusion.tome import bipartite_labels

__all__ = [
    "ATCConfig",
    "ClusterTree",
    "LayerSummary",
    "MergeConfig",
    "MergeMap",
    "Summary",
    "ToMeConfig",
    "agglomerate",
    "apply_patch",
    "bipartite_labels",
    "cluster_tree",
    "patched",
    "remove_patch",
    "summary",
]
__version__ = "0.1.0"
