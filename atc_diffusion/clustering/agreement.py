"""How far two clusterings of the same tokens differ."""

from torch import Tensor

# Rounding decides between distances that nearly tie, and one such decision moves a handful of tokens.
FEW = 0.05


def share_of_others(labels: Tensor, expected: Tensor) -> float:
    """Share of the tokens that have other company in `labels` `[B, N]` than in `expected` `[B, N]`."""
    differs = _together(labels) != _together(expected)
    return differs.any(dim=2).float().mean().item()


def _together(labels: Tensor) -> Tensor:
    """Whether two tokens are in one cluster, `[B, N, N]`."""
    return labels[:, :, None] == labels[:, None, :]
