"""The denoising runs that a network is in, told apart by their timesteps."""

import math
import threading
import weakref
from typing import Any

import torch

from atc_diffusion.adapters.noise import TRAINED
from atc_diffusion.calls.inputs import Clock
from atc_diffusion.calls.position import Entry, Position, time_of
from atc_diffusion.forecasting import Forecaster
from atc_diffusion.forecasting.deferred import Deferrals
from atc_diffusion.merging.reuse import ClusterCache
from atc_diffusion.report import RunLog


class Run:
    """Calls whose timesteps never go back, and what is remembered of them.

    Attributes:
        log: what happened in them.
        position: of the last call.
        clusters: those that may serve again.
        forecasts: the forecasts of its outputs; None until one is asked for.
        deferrals: calls of a ControlNet that are put off.
        clock: the numbers among the arguments that change at every step.
    """

    def __init__(self, log: RunLog | None = None) -> None:
        self.log = log or RunLog()
        self.position: Position | None = None
        self.clusters = ClusterCache()
        self.forecasts: Forecaster | None = None
        self.deferrals = Deferrals()
        self.clock = Clock()
        self._start = self._pace = math.nan
        self._first = 0  # index of its first entry, as an image-to-image run begins late

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies, and what is read from a file, have only the log of what happened."""
        return Run, (self.log,)

    def continues_at(self, entry: Entry | None, time: float) -> bool:
        """Whether a call at this place can be one of this run."""
        if self.position is None:
            return True
        if entry is not None and self.position.entry is not None:
            return entry.index >= self.position.entry.index
        return not time > self.position.time  # times that cannot be read are equal

    def began_before(self, entry: Entry) -> bool:
        return self._first < entry.index

    def advance(self, entry: Entry | None, time: float) -> Position:
        """Come to a call; returns its position."""
        position = self.position_at(entry, time)
        if entry is None and self.position is not None and time < self.position.time:
            self._pace = self.position.time - time
        if self.position is None:
            self._start, self._first = time, position.index
        self.position = position
        return position

    def position_at(self, entry: Entry | None, time: float) -> Position:
        """The position of a call that continues the run."""
        last = self.position
        if entry is not None:
            passed = 0 if last is None else last.passed + (entry.index > last.index)
            is_last = entry.index == len(entry.values) - 1
            count = len(entry.values) - (entry.index if last is None else self._first)
            return Position(entry.index, passed, time, entry.next_time, count, is_last, entry)
        if last is None:
            return Position(0, 0, time, time, math.nan, False)
        return self._by_pace(last, time) if time < last.time else last

    def _by_pace(self, last: Position, time: float) -> Position:
        """The position of a step whose run is as long as its last steps let expect, if they keep growing as they did.

        It may be the last step if two more like it would go beyond the end.
        """
        pace = last.time - time
        growth = max(pace / self._pace, 1.0) if self._pace > 0 else 1.0
        ratio, steps = growth - 1, time / pace
        steps = math.log1p(steps * ratio) / math.log1p(ratio) if ratio > 1e-3 else steps
        next_time = max(time - pace * growth, 0.0)
        steps += self._start < TRAINED - pace / 2  # a schedule that does not begin at the very noise ends at 0
        step = last.index + 1
        return Position(step, step, time, next_time, step + steps, time <= 2 * pace)


class Runs(threading.local):
    """The runs that one network is in: one for each thread and tensor of timesteps, and forgotten with that.

    Timesteps that are no entries of a longer tensor make one run for each thread.
    """

    def __init__(self) -> None:
        self._placed: weakref.WeakKeyDictionary[torch.UntypedStorage | None, Run] = weakref.WeakKeyDictionary()
        self._unplaced = Run()
        self._newest: Run | None = None  # of those in `_placed`
        self.call: object = None  # the present one, which is kept alive here

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies, and what is read from a file, begin afresh."""
        return Runs, ()

    def at(self, entry: Entry | None, time: float) -> Run:
        """The run that a call belongs to: a new one if its timestep goes back."""
        run = self.present(entry, time) or Run(self._log_of_restarted(entry))
        if entry is None:
            self._unplaced = run
        else:
            self._newest = self._placed[entry.timesteps()] = run
        return run

    def present(self, entry: Entry | None, time: float) -> Run | None:
        """The run that a call would continue."""
        run = self._unplaced if entry is None else self._placed.get(entry.timesteps()) or self._of_copied(entry)
        return run if run is not None and run.continues_at(entry, time) else None

    def _log_of_restarted(self, entry: Entry | None) -> RunLog | None:
        """The log of a run that goes back to a step after its first, as samplers do that add noise to repeat steps."""
        if entry is None or (before := self._placed.get(entry.timesteps())) is None:
            return None
        return before.log if before.began_before(entry) else None

    def _of_copied(self, entry: Entry) -> Run | None:
        """The newest run if a loop copies all timesteps at every step, as by converting them."""
        before = None if self._newest is None or self._newest.position is None else self._newest.position.entry
        if before is None or before.timesteps() is not None or before.values != entry.values:
            return None
        return self._newest if entry.index > before.index else None


def locate(timestep: object) -> tuple[Entry | None, float]:
    """The entry of a scheduler's timesteps that a call is at, if it is at one, and the value of its timestep.

    Timesteps in training are in no order, and an entry of a batch of them tells nothing.
    """
    entry = None if torch.is_grad_enabled() else Entry.of(timestep)
    return (None, time_of(timestep)) if entry is None else (entry, entry.values[entry.index])
