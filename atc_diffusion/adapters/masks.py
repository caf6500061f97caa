"""Additive attention masks that any kernel takes."""

from torch import Tensor
from torch.nn import functional as F

ROW = 8  # numbers: 16 bytes in half precision, by which xFormers' and PyTorch's kernels read a mask


def aligned(mask: Tensor) -> Tensor:
    """A copy of `mask` `[..., K]` whose rows lie in memory at multiples of eight numbers, which xFormers requires."""
    num_keys = mask.shape[-1]
    return F.pad(mask, (0, -num_keys % ROW))[..., :num_keys]
