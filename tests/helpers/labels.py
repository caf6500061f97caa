"""Labels in their canonical form."""

import torch
from torch import Tensor


def canonical(labels: Tensor) -> Tensor:
    """Number the clusters of labels `[N]` by their first token."""
    first = {int(label): i for i, label in reversed(list(enumerate(labels)))}
    order = sorted(first, key=lambda label: first[label])
    return torch.tensor([order.index(int(label)) for label in labels])


def assert_valid(labels: Tensor, num_clusters: int) -> None:
    for item in labels:
        assert item.unique().tolist() == list(range(num_clusters))
        assert torch.equal(item, canonical(item))
