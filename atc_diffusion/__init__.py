"""Faster Stable Diffusion by merging similar tokens: Agglomerative Token Clustering (ATC, ECCV 2024) for diffusers."""

from atc_diffusion.clustering import agglomerate, cluster_tree
from atc_diffusion.clustering.baselines import bipartite_labels
from atc_diffusion.clustering.tree import ClusterTree
from atc_diffusion.config import MergeConfig
from atc_diffusion.fidelity import psnr, ssim
from atc_diffusion.loading import load_pipeline
from atc_diffusion.merge_map import MergeMap
from atc_diffusion.methods import ATCConfig, ATCOptions, DPCKNNConfig, KMedoidsConfig, ToMeConfig
from atc_diffusion.patch import apply_patch, merge_maps, patched, remove_patch, summary
from atc_diffusion.report import ForecastSummary, LayerSummary, RecordedMerge, Summary
from atc_diffusion.tuning import Tuning, tune
from atc_diffusion.vit import ViTConfig

__all__ = [
    "ATCConfig",
    "ATCOptions",
    "ClusterTree",
    "DPCKNNConfig",
    "ForecastSummary",
    "KMedoidsConfig",
    "LayerSummary",
    "MergeConfig",
    "MergeMap",
    "RecordedMerge",
    "Summary",
    "ToMeConfig",
    "Tuning",
    "ViTConfig",
    "agglomerate",
    "apply_patch",
    "bipartite_labels",
    "cluster_tree",
    "load_pipeline",
    "merge_maps",
    "patched",
    "psnr",
    "remove_patch",
    "ssim",
    "summary",
    "tune",
]
__version__ = "0.4.0"
