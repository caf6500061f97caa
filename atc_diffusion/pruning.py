"""Pruning baselines as labels: the tokens that the class token attends to stay, the rest becomes one cluster.

Top-K (Haurum et al. 2023) hides that cluster from attention. EViT (Liang et al. 2022, Eq. 4) fuses it into one token.
"""

import torch
from torch import Tensor

from atc_diffusion.clustering.bipartite import number_clusters


def prune_labels(scores: Tensor, num_kept: int) -> tuple[Tensor, Tensor]:
    """Label the `num_kept` tokens of highest score each with a cluster of its own, and the rest with a common one.

    Args:
        scores: `[B, N]`, the class token's attention.
        num_kept: less than `N`.

    Returns:
        Labels `[B, N]` int64 of `num_kept + 1` clusters, numbered by their first token, and whether each cluster is
        the rest, `[B, num_kept + 1]`.
    """
    tokens = torch.arange(scores.shape[1], device=scores.device).expand_as(scores)
    order = scores.sort(dim=1, descending=True, stable=True).indices
    rest = order[:, num_kept:]
    labels = number_clusters(tokens.scatter(1, rest, rest.amin(dim=1, keepdim=True).expand_as(rest)))
    clusters = torch.arange(num_kept + 1, device=scores.device)
    return labels, clusters == labels.gather(1, rest[:, :1])
