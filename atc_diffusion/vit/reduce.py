"""Clustering and pruning of the tokens of one block, and the weights of clusters in later blocks.

Pruning is clustering, too: the tokens that the class token attends to keep clusters of their own, and the others make
one. Top-K (Haurum et al. 2023) hides that cluster from attention. EViT (Liang et al. 2022, Eq. 4) fuses it into one
token.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from atc_diffusion.clustering import agglomerate
from atc_diffusion.clustering.baselines import dpc_knn_labels, kmedoids_labels, match
from atc_diffusion.clustering.tree import number_clusters
from atc_diffusion.merge_map import MergeMap
from atc_diffusion.vit import ViTConfig


@dataclass(frozen=True, eq=False)
class Reduction:
    """All merges of one call so far.

    Attributes:
        merge_map: from the whole sequence, prefix tokens included, to the tokens that are left.
        bias: `[B, 1, 1, K]`, added to the attention's logits; None adds nothing.
    """

    merge_map: MergeMap
    bias: Tensor | None


@dataclass(frozen=True, eq=False)
class Attention:
    """Queries and keys of a block's self-attention.

    Attributes:
        queries: `[B, H, N, D]`, prefix tokens included.
        keys: `[B, H, N, D]`, prefix tokens included.
        reduction: that of earlier blocks.
        num_prefix_tokens: `P`, the first tokens, which are never merged.
    """

    queries: Tensor
    keys: Tensor
    reduction: Reduction | None
    num_prefix_tokens: int

    @property
    def features(self) -> Tensor:
        """Keys of the patches `[B, N - P, D]`, mean over heads, as in the authors' code and in ToMe's.

        Concatenated heads are no more accurate on the demo of eval/classify.py, and cost several times as much.
        """
        return self.keys[:, :, self.num_prefix_tokens :].mean(dim=1)

    def received(self, queries: slice) -> Tensor:
        """Attention `[B, N - P]` that patches receive from `queries`, summed over these and averaged over heads."""
        logits = self.queries[:, :, queries] @ self.keys.mT * self.keys.shape[-1] ** -0.5
        if self.reduction is not None and self.reduction.bias is not None:
            logits = logits + self.reduction.bias.to(logits.dtype)
        return logits.float().softmax(dim=-1).mean(dim=1).sum(dim=1)[:, self.num_prefix_tokens :]


def cluster(x: Tensor, attention: Attention, config: ViTConfig, num_clusters: int) -> tuple[Reduction, Tensor]:
    """Merge tokens `x` `[B, N, C]` to cluster means, weighted by the patches that each token has absorbed so far."""
    labels = _behind_prefix(_labels(attention, config, num_clusters), attention.num_prefix_tokens)
    if attention.reduction is not None:
        labels = labels.gather(1, attention.reduction.merge_map.labels)
        x = attention.reduction.merge_map.unmerge(x)
    merge_map = MergeMap(labels, attention.num_prefix_tokens + num_clusters)
    bias = merge_map.sizes.log()[:, None, None] if config.proportional_attention else None
    return Reduction(merge_map, bias), merge_map.merge(x)


def _labels(attention: Attention, config: ViTConfig, num_clusters: int) -> Tensor:
    features, prefix = attention.features, attention.num_prefix_tokens
    if config.method == "tome":
        # Tokens at odd places of the whole sequence, as in ToMe's code for vision transformers.
        destinations = torch.arange((1 - prefix) % 2, features.shape[1], 2, device=features.device)
        return match(features, destinations).cut(num_clusters)
    if config.method == "kmedoids":
        return kmedoids_labels(features, num_clusters, weights=attention.received(slice(None)))
    if config.method == "dpc_knn":
        return dpc_knn_labels(features, num_clusters)
    return agglomerate(features, num_clusters, config.linkage)


def prune(x: Tensor, attention: Attention, config: ViTConfig, num_clusters: int) -> tuple[Reduction, Tensor]:
    """Keep the tokens of `x` `[B, N, C]` that the class token attends to; fuse the rest into one, or hide it.

    Top-K's hidden token is computed, but no token attends to it, so the others are as if it were removed.
    """
    prefix, before = attention.num_prefix_tokens, attention.reduction
    scores = attention.received(slice(0, 1))
    labels, is_rest = prune_labels(scores, num_clusters - 1)
    if config.method == "evit":
        num_rest = scores.shape[1] - num_clusters + 1  # EViT's weighted sum is the mean of weighted tokens, times this
        weights = torch.where(is_rest.gather(1, labels), scores * num_rest, 1)
        x = x * F.pad(weights, (prefix, 0), value=1)[:, :, None].to(x.dtype)
    labels = _behind_prefix(labels, prefix)
    x = MergeMap(labels, prefix + num_clusters).merge(x)
    labels = labels if before is None else labels.gather(1, before.merge_map.labels)
    bias = _hide(is_rest, prefix) if config.method == "topk" else None
    return Reduction(MergeMap(labels, prefix + num_clusters), bias), x


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


def _hide(is_rest: Tensor, num_prefix_tokens: int) -> Tensor:
    bias = torch.zeros(is_rest.shape, device=is_rest.device).masked_fill(is_rest, -torch.inf)
    return F.pad(bias, (num_prefix_tokens, 0))[:, None, None]


def _behind_prefix(labels: Tensor, num_prefix_tokens: int) -> Tensor:
    """Labels of the whole sequence, in which every prefix token is a cluster of its own."""
    prefix = torch.arange(num_prefix_tokens, device=labels.device).expand(len(labels), -1)
    return torch.cat([prefix, labels + num_prefix_tokens], dim=1)
