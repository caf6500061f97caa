"""Distance from a cluster to the union of two others (Lance & Williams 1967).

`d_ki`, `d_kj` and `d_ij` are distances between clusters, `n_i`, `n_j` and `n_k` their sizes; all broadcast.
ATC's Eqs. 2 and 3 define complete and average; `ward` follows SciPy's convention.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Update = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def complete(d_ki: Tensor, d_kj: Tensor, d_ij: Tensor, n_i: Tensor, n_j: Tensor, n_k: Tensor) -> Tensor:
    return torch.maximum(d_ki, d_kj)


def average(d_ki: Tensor, d_kj: Tensor, d_ij: Tensor, n_i: Tensor, n_j: Tensor, n_k: Tensor) -> Tensor:
    return torch.lerp(d_ki, d_kj, n_j / (n_i + n_j))


def ward(d_ki: Tensor, d_kj: Tensor, d_ij: Tensor, n_i: Tensor, n_j: Tensor, n_k: Tensor) -> Tensor:
    squared = (n_i + n_k) * d_ki**2 + (n_j + n_k) * d_kj**2 - n_k * d_ij**2
    return (squared / (n_i + n_j + n_k)).clamp(min=0).sqrt()


UPDATES: dict[str, Update] = {"complete": complete, "average": average, "ward": ward}
