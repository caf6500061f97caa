"""How the weights of merged keys reach the softmax: in an additive mask, or in channels of the heads."""

import torch
from torch import Tensor
from torch.nn import functional as F

ROW = 8  # numbers: 16 bytes in half precision, by which xFormers' and PyTorch's kernels read masks and heads


def aligned(mask: Tensor) -> Tensor:
    """A copy of `mask` `[..., K]` whose rows lie in memory at multiples of eight numbers, which xFormers requires."""
    num_keys = mask.shape[-1]
    return F.pad(mask, (0, -num_keys % ROW))[..., :num_keys]


def attend(query: Tensor, key: Tensor, value: Tensor, log_weights: Tensor | None, widen: bool) -> Tensor:
    """PyTorch's attention `[B, Q, H, D]` with `log_weights` added to the logits.

    Args:
        query: `[B, Q, H, D]`.
        key: `[B, K, H, D]`.
        value: `[B, K, H, D]`.
        log_weights: `[B, K]` float32; None adds nothing.
        widen: add them in channels of the heads instead of in a mask.
    """
    width, mask = query.shape[-1], None
    if log_weights is not None and widen:
        query, key, value = wider_heads(query, key, value, log_weights)
    elif log_weights is not None:
        mask = log_weights[:, None, None].to(query.dtype)
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=width**-0.5)
    return attended[..., :width].transpose(1, 2)


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
