"""Differences between devices. `clustering.placement` decides which of them clusters."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch._subclasses import FakeTensor


def sums_segments(device: torch.device) -> bool:
    """Whether `embedding_bag` can be relied on: on MPS it came with PyTorch 2.10, elsewhere we have not run it."""
    return device.type in ("cpu", "cuda")


def dtype_of_sums(x: Tensor) -> torch.dtype:
    """The dtype in which `embedding_bag` must average `x`: CPUs round sums of float16, and they may overflow."""
    return torch.float32 if x.dtype == torch.float16 and x.device.type == "cpu" else x.dtype


def is_traced(x: Tensor) -> bool:
    """Whether the values of `x` cannot be had: torch.compile, FakeTensorMode, meta tensors, `torch.func`'s wrappers."""
    if torch.compiler.is_compiling() or isinstance(x, FakeTensor) or x.is_meta:
        return True
    return torch._C._are_functorch_transforms_active()


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Compute in the dtypes given; some devices have no autocast and refuse even to switch it off."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def devices_found() -> list[torch.device]:
    """The CPU, and an accelerator if there is one."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return [torch.device("cpu"), *([] if accelerator is None else [accelerator])]
