"""Where in a denoising run a call stands, found from its timestep."""

import math
from dataclasses import dataclass
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
from torch import Tensor

from atc_diffusion.adapters.noise import TRAINED

ROUNDING = 1e-2  # by which timesteps that a sampler interpolates miss each other
FEWEST_RISING = 4  # timesteps; fewer may be those of a batch in training that happen to rise

# Read once for each tensor of timesteps: on a GPU every read waits for the step before.
_values: "WeakKeyDictionary[torch.UntypedStorage, tuple[float, ...]]" = WeakKeyDictionary()


@dataclass(frozen=True)
class Entry:
    """An entry of a scheduler's timesteps, which fall from noise to image, or rise in inversion: a view of one tensor.

    Attributes:
        timesteps: refers to the memory of all entries; another one is another run, and a run ends with it.
        index: which entry it is.
        values: of all entries; NaN where they cannot be read.
    """

    timesteps: ReferenceType[torch.UntypedStorage]
    index: int
    values: tuple[float, ...]

    @classmethod
    def of(cls, timestep: object) -> "Entry | None":
        """The entry that a timestep is, expanded to a batch or not; None if it is no entry of ordered timesteps."""
        if not isinstance(timestep, Tensor) or is_transformed(timestep) or not timestep.numel():
            return None
        if any(size > 1 and stride for size, stride in zip(timestep.shape, timestep.stride(), strict=True)):
            return None
        storage = timestep.untyped_storage()
        count = storage.nbytes() // timestep.itemsize
        if count == 1 and (timestep._base is None or timestep._base.ndim == 0):  # a tensor of its own
            return None
        if storage not in _values:
            _values[storage] = _read(timestep, count)
        values = _values[storage]
        return cls(ref(storage), int(timestep.storage_offset()), values) if values else None

    def progress(self, later: int = 0) -> float:
        """The fraction of the denoising that lies before the entry `later` places on, from 0 (noise) to 1."""
        return min((self.index + later) / max(len(self.values) - 1, 1), 1.0)

    @property
    def next_time(self) -> float:
        """The timestep of the next entry; 0 after the last one."""
        return (*self.values, 0.0)[self.index + 1]

    @property
    def rises(self) -> bool:
        """Whether the timesteps rise, from image to noise."""
        return self.values[0] < self.values[-1]

    @property
    def are_in_pairs(self) -> bool:
        """Whether all timesteps but the first come in pairs, as for Heun's method."""
        pairs = list(zip(self.values[1::2], self.values[2::2], strict=False))
        return bool(pairs) and all(abs(first - second) < ROUNDING for first, second in pairs)


@dataclass(frozen=True)
class Position:
    """Where in a run a call stands.

    Attributes:
        index: which step it is, from 0; where the scheduler's timesteps are known, which of these.
        passed: how many steps of the run came before it.
        time: its timestep, from `TRAINED` (noise) to 0; NaN if it cannot be read.
        next_time: that of the next step, as far as it is known or expected.
        count: how many steps the run has, as far as that is known or expected.
        is_last: whether it is the last one, or may be.
        entry: the entry of the scheduler's timesteps that it is at, if known.
    """

    index: int
    passed: int
    time: float
    next_time: float
    count: float
    is_last: bool
    entry: Entry | None = None

    @property
    def times_around(self) -> tuple[float, ...]:
        """The timesteps of the step before, of this one and of the next three, as far as they are known."""
        if self.entry is None:
            return self.time, self.next_time
        return self.entry.values[max(self.index - 1, 0) : self.index + 4]

    @property
    def progress(self) -> float | None:
        """Progress of denoising, from 0 (noise) to 1; None if unknown."""
        if self.entry is not None:
            return self.entry.progress()
        return None if math.isnan(self.time) else min(max(1 - self.time / TRAINED, 0.0), 1.0)


def time_of(timestep: object) -> float:
    """The value of a timestep; NaN if it cannot be read."""
    if isinstance(timestep, Tensor) and (timestep.is_meta or type(timestep) is not Tensor or is_transformed(timestep)):
        return math.nan
    return float(torch.as_tensor(timestep).max())


def is_mixed(timestep: object, position: Position) -> bool:
    """Whether the items of a batch at a position are at different timesteps."""
    if position.entry is not None or math.isnan(position.time) or not isinstance(timestep, Tensor):
        return False
    return timestep.numel() > 1 and bool((timestep != position.time).any())


def is_transformed(x: Tensor) -> bool:
    """Whether a transform of `torch.func` is at work on a tensor, which then has no values of its own."""
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(x))


def _read(timestep: Tensor, count: int) -> tuple[float, ...]:
    """The values of all entries; NaN if they cannot be read, and none if they are in no order."""
    if timestep.is_meta or type(timestep) is not Tensor:
        return (math.nan,) * count
    values = timestep.detach().as_strided((count,), (1,), 0)
    times, steps = tuple(values.tolist()), values.diff()
    falls = count == 1 or (times[0] > times[-1] and bool((steps < ROUNDING).all()))
    rises = count >= FEWEST_RISING and times[0] < times[-1] and bool((steps > -ROUNDING).all())
    return times if falls or rises else ()
