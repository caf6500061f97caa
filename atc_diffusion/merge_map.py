"""A merge as a value: which cluster each token belongs to."""

from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from atc_diffusion.devices import dtype_of_sums, is_traced, sums_segments, without_autocast


class MergeMap:
    """Merge tokens `[B, N, C]` into cluster means `[B, K, C]` and copy them back.

    Both directions keep dtype and device, and give the same bits every time, on CUDA too. They have derivatives of any
    order, backward and forward, and work under `torch.func`.

    Args:
        labels: `[B, N]` int64 in `0..num_clusters - 1`, the cluster of every token.
        num_clusters: `K`.

    Raises:
        ValueError: if `labels` is not a batch of int64 labels, `num_clusters` is no whole number from 1 up, or a label
            on the CPU is out of range; on other devices that would have to wait for the device, and is not checked.

    Example:
        >>> merge_map = MergeMap(torch.tensor([[0, 1, 0]]), num_clusters=2)
        >>> merge_map.merge(torch.tensor([[[1.0], [5.0], [3.0]]]))
        tensor([[[2.],
                 [5.]]])
        >>> merge_map.unmerge(torch.tensor([[[2.0], [5.0]]]))
        tensor([[[2.],
                 [5.],
                 [2.]]])
    """

    def __init__(self, labels: Tensor, num_clusters: int) -> None:
        _check_arguments(labels, num_clusters)
        self.labels = labels
        self.num_clusters = num_clusters
        # Tokens sorted by cluster once, so that sums run over segments in a fixed order instead of racing.
        offsets = torch.arange(len(labels), device=labels.device)[:, None]
        self._clusters = labels + offsets * num_clusters
        sorted_labels, order = labels.sort(dim=1, stable=True)
        self._tokens = order + offsets * labels.shape[1]
        numbers = torch.arange(num_clusters, device=labels.device).expand(len(labels), -1).contiguous()
        self._starts = torch.searchsorted(sorted_labels, numbers)
        if labels.device.type == "cpu" and not is_traced(labels):  # elsewhere this would wait for the device
            _check_range(sorted_labels, num_clusters)

    def __repr__(self) -> str:
        return f"MergeMap(labels={list(self.labels.shape)}, num_clusters={self.num_clusters})"

    @property
    def sizes(self) -> Tensor:
        """Number of tokens in every cluster, `[B, K]` int64."""
        ends = F.pad(self._starts[:, 1:], (0, 1), value=self.labels.shape[1])
        return ends - self._starts

    def merge(self, x: Tensor) -> Tensor:
        """Means `[B, K, C]` of the tokens `x` `[B, N, C]` of every cluster."""
        self._check(x, self.labels.shape[1])
        if not x.is_floating_point():
            raise ValueError(f"tokens must be floating-point numbers to have means, got {x.dtype}; pass x.float()")
        if not sums_segments(x.device):
            return self._multiply(x)
        if torch.compiler.is_compiling():
            return self.sum_segments(x)
        # `torch.func` has no rules for the sum, and the labels may be mapped over as well.
        return self._multiply(x) if torch._C._are_functorch_transforms_active() else _SegmentMeans.apply(x, self)

    def sum_segments(self, x: Tensor) -> Tensor:
        starts = self._starts + torch.arange(len(x), device=x.device)[:, None] * x.shape[1]
        rows = x.flatten(0, 1).to(dtype_of_sums(x))
        means = F.embedding_bag(self._tokens.flatten(), rows, starts.flatten(), mode="mean")
        return means.unflatten(0, (len(x), self.num_clusters)).to(x.dtype)

    def _multiply(self, x: Tensor) -> Tensor:
        """As a product with a matrix `[B, K, N]`, smaller than the attention's own; in float32, lest sums overflow."""
        numbers = torch.arange(self.num_clusters, device=x.device)
        dtype = torch.promote_types(x.dtype, torch.float32)
        members = (self.labels[:, None, :] == numbers[:, None]).to(dtype)
        with without_autocast(x.device):
            return (members @ x.to(dtype) / self.sizes[:, :, None].clamp(min=1)).to(x.dtype)

    def unmerge(self, x: Tensor) -> Tensor:
        """A copy `[B, N, C]` of its cluster's row of `x` `[B, K, C]` for every token."""
        self._check(x, self.num_clusters)
        return F.embedding(self._clusters, x.reshape(len(x) * self.num_clusters, x.shape[2]))

    def _check(self, x: Tensor, rows: int) -> None:
        expected = (len(self.labels), rows)
        if x.ndim != 3 or tuple(x.shape[:2]) != expected:
            raise ValueError(f"expected a tensor [{expected[0]}, {expected[1]}, C], got {list(x.shape)}")


def _check_arguments(labels: object, num_clusters: int) -> None:
    if not isinstance(labels, Tensor):
        raise ValueError(f"labels must be an int64 tensor [B, N], got a {type(labels).__name__}")
    if labels.ndim != 2 or labels.dtype != torch.int64:
        raise ValueError(f"labels must be an int64 tensor [B, N], got {labels.dtype} {list(labels.shape)}")
    if not isinstance(num_clusters, Integral | torch.SymInt) or num_clusters < 1:
        raise ValueError(f"num_clusters must be a whole number from 1 up, got {num_clusters!r}")


def _check_range(sorted_labels: Tensor, num_clusters: int) -> None:
    if (sorted_labels[:, :1] < 0).any() or (sorted_labels[:, -1:] >= num_clusters).any():
        found = f"{sorted_labels.min()} to {sorted_labels.max()}"
        raise ValueError(f"labels of {num_clusters} clusters must be from 0 to {num_clusters - 1}, got {found}")


class _SegmentMeans(torch.autograd.Function):
    """`MergeMap.merge` by sums of segments, which PyTorch alone differentiates only once and only backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, merge_map: MergeMap) -> Tensor:
        ctx.merge_map = merge_map
        return merge_map.sum_segments(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        # Low precision cannot count the tokens of large clusters; those without tokens get no gradient.
        sizes = ctx.merge_map.sizes[:, :, None].clamp(min=1).to(torch.promote_types(grads[0].dtype, torch.float32))
        return ctx.merge_map.unmerge((grads[0] / sizes).to(grads[0].dtype)), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        return ctx.merge_map.merge(tangents[0])
