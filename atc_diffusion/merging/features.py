"""The features by which tokens are compared."""

from collections.abc import Callable

import torch
from torch import Tensor

from atc_diffusion.adapters import Projection
from atc_diffusion.config import Features


def make_features(which: Features, project: Projection, pick: Callable[[Tensor], Tensor]) -> Tensor:
    """Features `[B', N, D]` of the items of a batch that `pick` picks, from the keys and values of its tokens.

    Args:
        which: see `MergeConfig.features`; all but hidden states.
        project: gives keys or values.
        pick: picks items.
    """
    if which == "keys_values":
        return torch.cat([_unit_deviation(project("keys", pick)), _unit_deviation(project("values", pick))], dim=2)
    return project("keys" if which == "keys" else "values", pick)


def _unit_deviation(x: Tensor) -> Tensor:
    """Each item of `x` `[B, N, C]` divided by its standard deviation."""
    return x / x.float().std(dim=(1, 2), keepdim=True).clamp(min=1e-12).to(x.dtype)
