"""Labels from a tree in one pass: clusters are named by their first token, so parents come before their children."""

import torch
from torch import Tensor

from atc_diffusion.clustering._numba.compiled import Array, entry


def number_clusters(parents: Tensor, absorbed: Tensor) -> Tensor:
    """Labels `[B, N]` from the parent of each token that was absorbed (mask `absorbed`)."""
    labels = torch.empty_like(parents)
    _number(parents.numpy(), absorbed.numpy(), labels.numpy())
    return labels


@entry
def _number(parents: Array, absorbed: Array, labels: Array) -> None:
    for item in range(len(parents)):
        count = 0
        for token in range(parents.shape[1]):
            if absorbed[item, token]:
                labels[item, token] = labels[item, parents[item, token]]
            else:
                labels[item, token] = count
                count += 1
