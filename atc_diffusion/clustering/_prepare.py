"""Preparation of tokens, which all backends share."""

import torch
from torch import Tensor

FAR = 1e14  # a sum of such squares over all channels and tokens stays finite in float32


def prepare(tokens: Tensor, metric: str) -> Tensor:
    """Make all distances finite, and tokens unit vectors for cosine or centred for Euclidean distance."""
    if metric == "precomputed":
        return tokens.nan_to_num(FAR, FAR, FAR).clamp(max=FAR)
    tokens = tokens.nan_to_num(0, 0, 0).clamp(-FAR, FAR)
    if metric == "cosine":
        return torch.nn.functional.normalize(tokens, dim=2)
    return tokens - tokens.mean(dim=1, keepdim=True)
