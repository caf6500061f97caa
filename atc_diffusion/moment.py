"""The position of a network's call in a denoising run, found from its timestep."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Moment:
    """An entry of a scheduler's timesteps: a view into one tensor, which is located without being read.

    Attributes:
        timesteps: the memory of all entries; another one is another run.
        index: which entry it is.
        count: how many there are.
    """

    timesteps: torch.UntypedStorage
    index: int
    count: int

    @classmethod
    def of(cls, timestep: object) -> "Moment | None":
        """The moment of a timestep, expanded to a batch or not; None if it is no entry of a longer tensor."""
        if not isinstance(timestep, Tensor) or not timestep.numel():
            return None
        if any(size > 1 and stride for size, stride in zip(timestep.shape, timestep.stride(), strict=True)):
            return None
        storage = timestep.untyped_storage()
        count = storage.nbytes() // timestep.itemsize
        return cls(storage, int(timestep.storage_offset()), count) if count > 1 or _is_entry_of_one(timestep) else None

    def progress(self, later: int = 0) -> float:
        """The share of the denoising that lies before the entry `later` places on, from 0 (noise) to 1."""
        return min((self.index + later) / max(self.count - 1, 1), 1.0)


@dataclass(frozen=True)
class Step:
    """A step of a run.

    Attributes:
        index: which it is, from 0.
        is_last: whether it is the last one, or may be.
        share: the share of the schedule that it takes; those of all steps add up to at most 1.
    """

    index: int
    is_last: bool
    share: float


def _is_entry_of_one(timestep: Tensor) -> bool:
    """Whether this is the only entry of a schedule, not a tensor of its own."""
    return timestep._base is not None and timestep._base.ndim > 0


def progress_by_value(timestep: object) -> float | None:
    """Progress in a schedule from 1000 to 0; None if the timestep is unreadable without a device sync."""
    if isinstance(timestep, Tensor) and timestep.device.type != "cpu":
        return None
    return min(max(1 - float(torch.as_tensor(timestep).max()) / 1000, 0.0), 1.0)


def rising_time(timestep: object) -> float:
    """A time that rises while the timestep falls; minus infinity for a tensor without data."""
    if isinstance(timestep, Tensor) and (timestep.is_meta or type(timestep) is not Tensor):
        return -torch.inf
    return -float(torch.as_tensor(timestep).max())
