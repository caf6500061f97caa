"""Where in a denoising run a call is, and for how long its clusters serve. Knows no tokens and no model."""

import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from atc_diffusion.clustering.tree import Cuttable
from atc_diffusion.merge_map import MergeMap
from atc_diffusion.report import RunLog

MAX_LANES = 256  # calls at one moment that are told apart; a loop that never leaves its moment stops here


@dataclass(frozen=True)
class Moment:
    """An entry of a scheduler's timesteps: a view into one tensor, which need not be read to tell run and order.

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
        """How much of the denoising lies behind the entry `later` places on, from 0 (noise) to 1."""
        return min((self.index + later) / max(self.count - 1, 1), 1.0)


def _is_entry_of_one(timestep: Tensor) -> bool:
    """Whether this is the only entry of a schedule, not a tensor of its own."""
    return timestep._base is not None and timestep._base.ndim > 0


def progress_by_value(timestep: object) -> float | None:
    """Progress in a schedule from 1000 to 0; None if the timestep is unreadable without a device sync."""
    if isinstance(timestep, Tensor) and timestep.device.type != "cpu":
        return None
    return min(max(1 - float(torch.as_tensor(timestep).max()) / 1000, 0.0), 1.0)


@dataclass(frozen=True)
class Clusters:
    """What has been clustered and still serves.

    Attributes:
        trees: by the name of what shares them: a layer, or several.
        maps: cuts of these trees, by that name and the number of clusters.
    """

    trees: dict[str, Cuttable] = field(default_factory=dict)
    maps: dict[tuple[str, int], MergeMap] = field(default_factory=dict)

    def keep_maps(self, counts: set[int]) -> None:
        """Forget the cuts of other `counts`, so that a schedule of shares does not pile them up."""
        for key in [key for key in self.maps if key[1] not in counts]:
            del self.maps[key]


@dataclass
class Lane:
    """The calls at one place in the order of every moment: a picture, a tile, or one part of its guidance.

    Attributes:
        guidance_parts: how many parts of the batch are the same pictures under different guidance; 1 if unknown.
        clusters: replaced, never emptied: a call keeps those that it has used.
    """

    guidance_parts: int = 1
    clusters: Clusters = field(default_factory=Clusters)
    _kind: object = None
    _clustered_at: int = 0
    _calls: int = 0

    def advance(self, sample: Tensor, index: int, refresh_every: int, share_guidance: bool) -> None:
        """Make ready for a call with `sample` `[B, C, ...]` at entry `index` of the timesteps."""
        kind = (sample.shape, sample.dtype, sample.device, torch.is_inference_mode_enabled())
        if kind != self._kind:
            self._kind, self._calls, self.guidance_parts = kind, 0, 1
        if self._calls == 0 or index - self._clustered_at >= refresh_every:
            self.clusters, self._clustered_at = Clusters(), index
        if share_guidance and self._calls == 1:
            # Now, not at the first call: there, different prompts of one seed have equal latents too.
            self.guidance_parts = _guidance_parts(sample)
        self._calls += 1


class Run:
    """One pass along a scheduler's timesteps, and a log of what happened in it."""

    def __init__(self) -> None:
        self.log = RunLog()
        self.index = -1
        self._lanes: list[Lane] = []
        self._order = 0

    def lane(self, index: int) -> Lane:
        """The lane of the next call, which is at entry `index`; calls at one entry are told apart by their order."""
        if index != self.index:
            self.index, self._order = index, 0
        if self._order == MAX_LANES:
            return Lane()
        if self._order == len(self._lanes):
            self._lanes.append(Lane())
        self._order += 1
        return self._lanes[self._order - 1]


class Schedule:
    """The runs that one network is in, by their timesteps; a run is forgotten when its timesteps are.

    Threads may share it, each with a run of its own.
    """

    def __init__(self) -> None:
        self._runs: weakref.WeakKeyDictionary[torch.UntypedStorage, Run] = weakref.WeakKeyDictionary()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies, and what is read from a file, begin afresh."""
        return Schedule, ()

    def run(self, moment: Moment | None) -> Run:
        """The run that a moment belongs to: a new one where no moment is known, or where it goes back."""
        if moment is None:
            return Run()
        with self._lock:
            run = self._runs.get(moment.timesteps)
            if run is None or moment.index < run.index:
                run = self._runs[moment.timesteps] = Run()
            return run


def _guidance_parts(sample: Tensor) -> int:
    """How many times the batch repeats the same latents: the first four channels of `sample` `[B, C, ...]`.

    Of patches `[B, N, C]` it compares the first four.
    """
    return next((parts for parts in _divisors(len(sample)) if _are_equal(sample[:, :4].chunk(parts))), 1)


def _divisors(batch: int) -> Iterator[int]:
    return (parts for parts in (3, 2) if batch % parts == 0)


def _are_equal(parts: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(parts[0], other) for other in parts[1:])
