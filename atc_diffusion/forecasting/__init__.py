"""Need this call of a network be made? Not if the clean image that it would see can be forecast well enough.

The clean image is extrapolated from what earlier calls saw, and turned into an output with the present latents. At each
call that is made, what it sees is compared with the forecast for it. The change of the latents that the next forecast
would cause is expected from that error, from how far the forecast reaches, and from what the sampler makes of it.
"""

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import count, pairwise
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from atc_diffusion.adapters import Family
from atc_diffusion.adapters.noise import NoiseSchedule
from atc_diffusion.calls.inputs import Inputs
from atc_diffusion.calls.position import Position
from atc_diffusion.forecasting.series import MAX_SKIPPED, Seen, Series, norms
from atc_diffusion.forecasting.trajectories import PATIENCE, Trajectory, parts_of

FEWEST_STEPS = 12  # of a run in which anything is forecast; with 10, fewer steps come as close in the same time
NOISE = 0.2  # of the noise that a sampler adds to latents that are all image, the part that counts as allowed error
NOISY_STEPS = 20  # for which that holds; the more steps, the more noise there is in all, and the less of it counts
GROWTH = 1.0, 5.0  # of an error until the image is done: the least, and more in noise, where images take shape
OUTPUT = 0.2  # times the tolerance: the largest expected error of one output, and more where a sampler adds noise
LONGER = 2.0  # times as long may a step be as the one before: solvers weigh their memory with that ratio
MAX_IMAGES = 64  # that take turns; a loop that never leaves its timestep forgets its oldest images here,
MAX_BYTES = 2**28  # or where what is kept of them fills 256 MiB

_calls: "WeakKeyDictionary[Forecaster, _LastCall]" = WeakKeyDictionary()  # of all networks in all threads
_lock = threading.Lock()
_numbers = count()


@dataclass
class Decision:
    """Whether a call is made.

    Attributes:
        output: what the network returns without running; None: it must run.
        reason: why it must run; "" otherwise.
        end: takes what the network returned, and gives what its caller gets.
    """

    output: Any = None
    reason: str = ""
    end: Callable[[Any], Any] = lambda returned: returned


class Forecaster:
    """The forecasts of one run, of any number of images.

    Args:
        family: the adapter of the network.
        noise: how noisy the latents are at a timestep.
        roughness: the largest that the solver may have, as `Fit.roughness`.
        tolerance: how far all forecasts of the run together may be expected to change the latents, relative to these.
    """

    def __init__(self, family: Family, noise: NoiseSchedule, roughness: float, tolerance: float) -> None:
        self._family = family
        self._noise = noise
        self._roughness = roughness
        self._tolerance = tolerance
        self._trajectories: list[Trajectory] = []
        self._channels: int | None = None  # that are denoised; known from the first output
        self._refused = -math.inf  # the last step at which a call had to be made, whatever is forecast for it

    def decide(self, inputs: Inputs, position: Position) -> Decision:
        """Whether a call is made."""
        if reason := self._never(inputs, position):
            self.refuse(position)
            return Decision(reason=reason)
        latents = self._denoised(inputs)
        parts = parts_of(latents)
        trajectory = self._trajectory(latents[parts[0]], inputs, position)
        found = trajectory.matching(inputs, parts)
        series = found[0] if found else Series(inputs.clone(), parts, position.index)
        if not found:
            trajectory.series.append(series)
        jumped = series.take_added(inputs.moving[1:])
        reason = trajectory.refusal or self._reason(trajectory, series, position)
        if jumped:
            reason = "what a ControlNet adds has changed"
        if any(not _same(each.clean, series.clean) for each in found):
            reason = "calls that look the same differ"
        series.come_to(position.index)
        if reason:
            trajectory.refusal = reason
            return Decision(reason=reason, end=partial(self._learn, trajectory, series, latents, position))
        return Decision(self._forecast(trajectory, series, latents, position))

    def meet(self, inputs: Inputs, position: Position) -> None:
        """Refuse this step in every run whose network is called with these latents at it, too.

        Parts of guidance can belong to several runs: of two networks or threads, or if only one records gradients.
        """
        if not inputs.readable:
            return
        image = inputs.latents[:1].detach().clone()
        with _lock:
            since = _calls[self].number if self in _calls else -1
            for other, last in _calls.items():
                if last.number > since and torch.equal(last.image, image.to(last.image)):
                    self.refuse(position)
                    other.refuse(last.position)
            _calls[self] = _LastCall(next(_numbers), position, image)

    def refuse(self, position: Position) -> None:
        """Know that a call at this position is made, and so all others of its step: guidance multiplies differences."""
        self._refused = position.index

    def expects(self, inputs: Inputs, position: Position) -> bool:
        """Whether the calls that continue those of the step before, with these latents, will be forecast."""
        if self._never(inputs, position):
            return False
        latents = self._denoised(inputs)
        trajectory = self._trajectory(latents[parts_of(latents)[0]], inputs, position)
        waiting = [each for each in trajectory.series if each.index < position.index]
        return bool(waiting) and not any(self._reason(trajectory, each, position) for each in waiting)

    def _never(self, inputs: Inputs, position: Position) -> str:
        """Why no call at a position is forecast; "" if one may be."""
        if torch.is_grad_enabled() or not inputs.readable or math.isnan(position.time):
            return "gradients are recorded, or values unreadable"
        if position.entry is not None and (position.entry.values[0] <= 1 or position.entry.values[-1] < 0):
            return "the timesteps are not on a scale from 1000 to 0"
        if position.entry is not None and position.entry.are_in_pairs:
            return "the sampler repeats its timesteps"
        if position.entry is not None and position.entry.rises:
            return "the timesteps rise, as in inversion"
        if position.count < FEWEST_STEPS - 0.5:  # which may be an estimate
            seems = "which this one seems to be" if position.entry is None else "which this one is"
            return f"nothing is skipped in runs of fewer than {FEWEST_STEPS} steps, {seems}"
        return ""

    def _reason(self, trajectory: Trajectory, series: Series, position: Position) -> str:
        """Why a call is not forecast; "" if it is."""
        if position.is_last or position.passed < 2 or math.isnan(position.count):
            return "the first two steps and the last are computed"
        if self._refused >= position.index - 1:
            return "another call of the same step had to be made"
        if trajectory.fit is None or len(series.computed) < 2:
            return "the latents or their conditions are not those of a run so far"
        if trajectory.is_surprising:
            return "the latents changed by more than the sampler explains"
        if len(series.forecast) == min(MAX_SKIPPED, len(series.computed) - 1):
            return f"no more than {MAX_SKIPPED} steps in a row are skipped, and one after the first two"
        if not self._bears_errors(trajectory):
            return "the latents follow from several earlier steps, which would magnify errors"
        steps = [now - later for now, later in pairwise(position.times_around)]
        if any(later > LONGER * now for now, later in pairwise(steps)):
            return "the next steps are much longer"
        if not self._error(series, position) <= self._tolerance * (OUTPUT + trajectory.fit.new):
            return "forecasts were not accurate enough"
        change = self._change(series, position)
        image = self._noise(position.time).alpha  # errors of the first steps can change a whole composition
        noise = NOISE * image * trajectory.fit.new * min(1.0, NOISY_STEPS / position.count)
        allowed = self._tolerance * (1 / position.count + noise)
        return "" if series.owed + change <= allowed else "forecasts were not accurate enough"

    def _bears_errors(self, trajectory: Trajectory) -> bool:
        """Whether the solver, as far as its memory is known, does not magnify errors that come and go."""
        return not trajectory.is_filling and trajectory.roughness <= self._roughness

    def _error(self, series: Series, position: Position) -> float:
        """The expected error of a forecast output, relative to the latents."""
        noise = self._noise(position.time)
        return series.expected_error(position.time, noise.log_ratio) * abs(noise.clean_factor)

    def _change(self, series: Series, position: Position) -> float:
        """By how much a forecast is expected to change the latents in the end, relative to these."""
        if position.next_time == position.time:
            return math.inf
        noise = self._noise(position.time)
        taken = (1 - self._kept(position)) * self._noise(position.next_time).alpha
        growth = GROWTH[0] + GROWTH[1] * noise.sigma
        return series.expected_error(position.time, noise.log_ratio) * taken * growth

    def _kept(self, position: Position) -> float:
        """The factor of the latents in the next ones, on a scale where the clean image has the factor 1 in both."""
        if position.is_last:
            return 0.0
        now, later = (self._noise(time).log_ratio for time in (position.time, position.next_time))
        return math.exp(min(now - later, 0.0))

    def _forecast(self, trajectory: Trajectory, series: Series, latents: Tensor, position: Position) -> Any:
        """What the network would return, in the form in which it last did."""
        series.owed += self._change(series, position)
        noise, added_noise = self._noise(position.time), trajectory.noise_in(series.parts)
        series.clean = series.extrapolated(position.time, added_noise)
        seen = Seen(position.time, noise.log_ratio, series.clean, added_noise)
        series.forecast.append((seen, self._kept(position)))
        return self._family.returned(series.template, noise.output(latents, series.clean))

    def _learn(self, trajectory: Trajectory, series: Series, latents: Tensor, position: Position, returned: Any) -> Any:
        """Learn from what a call returned; gives it back, changed so that it makes up for forecasts before it."""
        if len(returned) != 1:
            return returned
        output = self._family.output(returned, latents)
        if self._channels is None and output.shape[1] < latents.shape[1]:
            self._channels = output.shape[1]
            latents = latents[:, : self._channels]
            series.parts = parts_of(latents)
            trajectory.latents = latents[series.parts[0]]
        noise, kept = self._noise(position.time), self._kept(position)
        clean = noise.clean(latents, output[:, : latents.shape[1]])
        seen = Seen(position.time, noise.log_ratio, clean, trajectory.noise_in(series.parts))
        better = series.see(seen, norms(latents), noise.clean_factor, kept, self._bears_errors(trajectory))
        series.template, series.clean, series.owed = returned, seen.image if better is None else better, 0.0
        return returned if better is None else self._family.returned(returned, noise.output(latents, better))

    def _denoised(self, inputs: Inputs) -> Tensor:
        """The channels that are denoised, as far as that is known, of each item, float32."""
        return inputs.latents[:, : self._channels].detach().float().clone()

    def _trajectory(self, latents: Tensor, inputs: Inputs, position: Position) -> Trajectory:
        """The images that the `latents` of `inputs` belong to, or new ones."""
        for trajectory in self._trajectories:
            if trajectory.is_at(latents, position):
                return trajectory
        fits = [(fit, each) for each in self._trajectories if (fit := each.fit_to(latents, position))]
        fits.sort(key=lambda pair: pair[0].new)
        if not fits or (len(fits) > 1 and fits[1][0].new < 2 * fits[0][0].new + 1e-3):
            return self._begin(Trajectory(position, latents, is_half=inputs.latents.itemsize == 2))
        fit, trajectory = fits[0]
        fresh, alpha = self._fresh(trajectory.position, position), self._noise(position.time).alpha
        trajectory.advance(latents, position, fit, fresh, alpha)
        trajectory.refusal = self._refusal(trajectory, position)
        return trajectory

    def _refusal(self, trajectory: Trajectory, position: Position) -> str:
        """Why some part of guidance is computed at a step, and so all are; "" if none is.

        Guidance multiplies the difference of its parts, and the errors of parts that are all forecast largely cancel.
        A part may come every few steps only.
        """
        last, step = trajectory.last_index, position.index
        due = [each for each in trajectory.series if each.index >= min(last, step - (each.pause or PATIENCE))]
        return next(filter(None, (self._reason(trajectory, each, position) for each in due)), "")

    def _fresh(self, before: Position, position: Position) -> float:
        """The norm of the noise that an ancestral sampler adds between two steps, relative to the latents."""
        start, end = (self._noise(each.time) for each in (before, position))
        return end.sigma * math.sqrt(max(0.0, 1 - math.exp(2 * (start.log_ratio - end.log_ratio))))

    def _begin(self, trajectory: Trajectory) -> Trajectory:
        least = trajectory.position.index - PATIENCE
        awaited = [each for each in self._trajectories if each.position.index >= least]
        self._trajectories = [*awaited[1 - MAX_IMAGES :], trajectory]
        while len(self._trajectories) > 1 and sum(each.num_bytes for each in self._trajectories) > MAX_BYTES:
            del self._trajectories[0]
        return trajectory


@dataclass(frozen=True)
class _LastCall:
    """The last call of a run: which of all calls it was, where it stood, and the latents of its first image."""

    number: int
    position: Position
    image: Tensor


def _same(x: Tensor | None, y: Tensor | None) -> bool:
    return x is y or (x is not None and y is not None and torch.equal(x, y))
