"""The clean images that a network saw of one image under one condition, and where they go next."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from atc_diffusion.calls.inputs import Inputs

MAX_SKIPPED = 2  # calls in a row that may be forecast
MAX_MENDED = 0.08  # of the norm of the latents: what a computed output may be changed by to make up for forecasts
SIGNIFICANT = 6  # standard deviations of the correlation of independent noise
TINY = torch.finfo(torch.float32).tiny

Parts = list[list[int]]  # for each part of guidance in a batch, the items at which its images stand


@dataclass(frozen=True)
class Seen:
    """A clean image that a network saw.

    Attributes:
        time: the timestep.
        log_ratio: log(alpha / sigma).
        image: `[B, C, ...]`, float32.
        noise: all that the sampler had added to the latents, on the scale of the clean image, `[B, C, ...]`.
    """

    time: float
    log_ratio: float
    image: Tensor
    noise: Tensor

    def moved(self, time: float, noise: Tensor, velocity: Tensor, response: Tensor) -> Tensor:
        """The image at another time and with other noise, of which the network takes the part `response` for image."""
        return self.image + velocity * (time - self.time) + response * (noise - self.noise)


@dataclass
class Series:
    """The calls for one image under one condition, such as a prompt.

    Attributes:
        inputs: of its first call.
        parts: the parts of guidance in its batch.
        index: the step of its last call.
        pause: the most steps from one call to the next so far; 0 until there are two.
        computed: what the network saw in its last computed calls, the newest last.
        forecast: what it was forecast to see in the calls since, with the factor of the latents in each step.
        clean: of its last call, computed or forecast.
        template: what the network last returned; a forecast has the same form.
        off: how far off the last forecast that was compared is, relative to the latents, `[B, C, ...]`; None: settled.
        error: of the last forecast that was compared, relative to the latents of the worst item.
        reach: how far that reached, as a change of the timestep and of log(alpha / sigma).
        owed: the change of the latents that is expected from the calls that were forecast since.
        added: what a ControlNet added in the last call; each `[B, C, ...]`.
        added_change: the largest relative change of that from one step to the next so far; None at the first.
    """

    inputs: Inputs
    parts: Parts
    index: int
    pause: int = 0
    computed: list[Seen] = field(default_factory=list)
    forecast: list[tuple[Seen, float]] = field(default_factory=list)
    clean: Tensor | None = None
    template: Any = None
    off: Tensor | None = None
    error: float = math.inf
    reach: tuple[float, float] = (1.0, 1.0)
    owed: float = 0.0
    added: tuple[Tensor, ...] = ()
    added_change: float | None = None

    def come_to(self, step: int) -> None:
        """Be called at `step`."""
        self.pause, self.index = max(self.pause, step - self.index), step

    def take_added(self, added: tuple[Tensor, ...]) -> bool:
        """Take in what a ControlNet adds to a call; whether that has changed much more than from step to step before.

        What was put off is not among it: a ControlNet is put off only as long as its own conditions stay.
        """
        if not added:
            return False
        before, self.added = self.added, tuple(x.float().clone() for x in added)
        if [x.shape for x in added] != [x.shape for x in before]:
            return False
        pairs = zip(self.added, before, strict=True)
        change = float(torch.stack([(norms(new - old) / norms(old).clamp(min=TINY)).max() for new, old in pairs]).max())
        usual, self.added_change = self.added_change, max(change, self.added_change or 0.0)
        return usual is not None and not change <= 2 * usual + 0.05

    def extrapolated(self, time: float, noise: Tensor) -> Tensor:
        """The clean image expected at `time`: the last one, moving on as the change before the last let expect.

        The factor by which the change before would have had to be multiplied to give the last one is near 1 with
        deterministic samplers, and near 0 where a sampler adds noise. What the network takes for image in that noise
        is no such change, and comes with the noise that was added since.
        """
        *earlier, last = self.computed
        if not earlier:
            return last.image
        response = self._response()
        velocity = _velocity(earlier[-1], last, response)
        if len(earlier) > 1:
            before = _velocity(earlier[-2], earlier[-1], response)
            factor = _dot(velocity, before) / _dot(before, before).clamp(min=TINY)
            velocity = velocity * per_item(factor.clamp(0, 1), velocity)
        return last.moved(time, noise, velocity, response)

    def _response(self) -> Tensor:
        """The part of added noise that the network takes for image; 0 where they are not clearly correlated."""
        before, last = self.computed[-2:]
        change, noise = last.image - before.image, last.noise - before.noise
        product, square = _dot(change, noise), _dot(noise, noise)
        is_clear = product > SIGNIFICANT * (_dot(change, change) * square / change[0].numel()).sqrt()
        response = torch.where(is_clear, product / square.clamp(min=TINY), 0).clamp(max=1)
        return per_item(response, noise)

    def expected_error(self, time: float, log_ratio: float) -> float:
        """Of the forecast for `time`, relative to the latents; of the worst item.

        Errors grow with how far a forecast reaches, by either measure, and once more where it reaches further than the
        change that it goes by. They shrink with the noise.
        """
        before, last = self.computed[-2:]
        reach, base = abs(time - last.time), abs(last.time - before.time)
        further = max(reach / self.reach[0], abs(log_ratio - last.log_ratio) / self.reach[1])
        less_noise = math.hypot(1.0, math.exp(last.log_ratio)) / math.hypot(1.0, math.exp(log_ratio))
        return self.error * further * max(1.0, reach / base) * less_noise

    def see(self, seen: Seen, size: Tensor, clean_factor: float, factor: float, is_smooth: bool) -> Tensor | None:
        """Take in what a computed call saw.

        The calls that were forecast before it can now be interpolated, and so the samplers' latents are known to be
        off. What the next step takes from the output can make up for that.

        Args:
            seen: the clean image.
            size: the norm of each item's latents, `[B]`.
            clean_factor: of the clean image in an output.
            factor: of the latents in the step that follows, in which the clean image has the factor `1 - factor`.
            is_smooth: whether the sampler bears an output that jumps.

        Returns:
            the clean image that makes up for earlier forecasts; None if there is nothing to make up for.
        """
        if self.computed and seen.time == self.computed[-1].time:
            del self.computed[-1]
        elif self.computed:
            last = self.computed[-1]
            error = seen.image - self.extrapolated(seen.time, seen.noise)
            self.off = error / per_item(size.clamp(min=TINY), error)
            self.reach = abs(seen.time - last.time), max(abs(seen.log_ratio - last.log_ratio), TINY)
        self.computed = [*self.computed[-2:], seen]
        off, self.forecast = self._off(), []
        if off is None or not is_smooth or not 0 < factor < 1:
            return None
        off = off * (factor / (1 - factor))
        in_output = norms(off) * max(1.0, abs(clean_factor))
        limit = (MAX_MENDED * size / in_output.clamp(min=TINY)).clamp(max=1)
        return seen.image - off * per_item(limit, off)

    def _off(self) -> Tensor | None:
        """How far off the latents are because of the calls that were forecast, as a clean image is."""
        if not self.forecast:
            return None
        before, now = self.computed[-2:]
        response = self._response()
        velocity = _velocity(before, now, response)
        off = torch.zeros_like(now.image)
        for seen, factor in self.forecast:
            interpolated = before.moved(seen.time, seen.noise, velocity, response)
            off = factor * off + (1 - factor) * (seen.image - interpolated)
        return off


def _velocity(before: Seen, after: Seen, response: Tensor) -> Tensor:
    return (after.image - before.image - response * (after.noise - before.noise)) / (after.time - before.time)


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return (x.flatten(1) * y.flatten(1)).sum(dim=1)


def norms(x: Tensor) -> Tensor:
    """Of each item, `[B]`."""
    return x.flatten(1).norm(dim=1)


def per_item(values: Tensor, x: Tensor) -> Tensor:
    """Values `[B]` in a shape that multiplies the items of `x`."""
    return values.to(x).reshape(-1, *[1] * (x.ndim - 1))
