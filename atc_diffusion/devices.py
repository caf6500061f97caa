"""Differences between devices. `clustering.placement` decides which of them clusters."""

from contextlib import AbstractContextManager, nullcontext

import torch


def sums_segments(device: torch.device) -> bool:
    """Whether `embedding_bag` can be relied on: on MPS it came with PyTorch 2.10, elsewhere we have not run it."""
    return device.type in ("cpu", "cuda")


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Compute in the dtypes given; some devices have no autocast and refuse even to switch it off."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def devices_found() -> list[torch.device]:
    """The CPU, and an accelerator if there is one."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return [torch.device("cpu"), *([] if accelerator is None else [accelerator])]
