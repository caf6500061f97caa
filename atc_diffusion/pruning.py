"""Pruning baselines as labels: keep the tokens that the class token attends to, and put the rest into one cluster.

Top-K (Haurum et al. 2023) hides that cluster from attention. EViT (Liang et al. 2022, Eq. 4) fuses it into one token.
"""

import torch
from torch import Tensor

from atc_diffusion.clustering.bipartite import number_clusters


def prune_labels(scores: Tensor, num_kept: int) -> tuple[Tensor, Tensor]:
    """Give each of the `num_kept` tokens of highest score a cluster of its own, and the others a common cluster.

    Args:
        scores: `[B, N]`, the attention that each token receives from the class token.
        num_kept: tokens to keep, fewer than `N`.

    Returns:
        Labels `[B, N]` int64 of `num_kept + 1` clusters, numbered by their first token, and a mask
        `[B, num_kept + 1]` that is true for the common cluster.
    """
    tokens = torch.arange(scores.shape[1], device=scores.device).expand_as(scores)
    order = scores.sort(dim=1, descending=True, stable=True).indices
    rest = order[:, num_kept:]
    labels = number_clusters(tokens.scatter(1, rest, rest.amin(dim=1, keepdim=True).expand_as(rest)))
    clusters = torch.arange(num_kept + 1, device=scores.device)
    return labels, clusters == labels.gather(1, rest[:, :1])
