"""How the weights of merged keys reach the softmax: in an additive mask, or in channels of the heads."""

import torch
from torch import Tensor
from torch.nn import functional as F

ROW = 8  # numbers: 16 bytes in half precision, by which xFormers' and PyTorch's kernels read masks and heads


def aligned(mask: Tensor) -> Tensor:
    """A copy of `mask` `[..., K]` whose rows lie in memory at multiples of eight numbers, which xFormers requires."""
    num_keys = mask.shape[-1]
    return F.pad(mask, (0, -num_keys % ROW))[..., :num_keys]


def wider_heads(query: Tensor, key: Tensor, value: Tensor, log_weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Heads for the same softmax without a mask: `q k + log n` is the product of `[q, 1]` and `[k, log n]`.

    In half precision the logarithm takes two channels, its value and what rounding took from it.

    Args:
        query: `[B, Q, H, D]`; attention must keep their scale, `D ** -0.5`.
        key: `[B, K, H, D]`.
        value: `[B, K, H, D]`; of what is attended to, the first `D` channels count.
        log_weights: `[B, K]` float32, added to the logits.
    """
    logs = log_weights * query.shape[-1] ** 0.5  # the logits are multiplied by the scale
    high = logs.to(key.dtype)
    columns = torch.stack([high, (logs - high).to(key.dtype)], dim=-1)[:, :, None]
    one = torch.ones_like(columns[:1, :1])
    return _widened(query, one), _widened(key, columns), _widened(value, torch.zeros_like(one))


def _widened(x: Tensor, columns: Tensor) -> Tensor:
    """`x` `[B, N, H, D]` with `columns` `[B, N, 1, E]` behind its channels, and zeros up to a multiple of eight."""
    x = torch.cat([x, columns.expand(*x.shape[:3], -1)], dim=-1)
    return F.pad(x, (0, -x.shape[-1] % ROW))
