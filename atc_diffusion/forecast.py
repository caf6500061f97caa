"""Decides which calls of a network can be skipped because their output can be extrapolated from earlier outputs.

The decision rests on two measurements and on no assumption about the sampler:

*Which picture does the call continue?* A deterministic sampler makes the next latents as a weighted sum of earlier
latents and outputs. Latents that are not such a sum belong to another picture, had noise added, or were edited.

*How large would the error be?* At each call that is computed, the output is compared with its forecast. The remainder
term of polynomial interpolation turns that into the expected error of the next forecast. Multiplied by the length of
the step, it is the change of the latents that the forecast would cause. Each step may cause its share of the tolerance,
so the total does not grow with the number of steps.
"""

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from atc_diffusion.extrapolation import ORDER, Lane, largest_change, output_of
from atc_diffusion.inputs import Inputs
from atc_diffusion.moment import Moment, Step

FEWEST_STEPS = 20  # of a schedule in which anything is forecast; with 15, fewer steps come closer in the same time
EVEN = 1.2  # steps that grow by at most this factor count as even
MEMORY = 4  # steps that latents are made of, at most; as many as fourth-order multistep samplers use
SAMPLES = 2048  # of the latents' values that are looked at
MAX_PICTURES = 256  # a loop with more at one step forgets the oldest


@dataclass
class Picture:
    """One picture on its way from noise: its latents and outputs so far.

    Attributes:
        index: its present step.
        latents: `[B, C, ...]`, as the network gets them.
        channels: how many of `C` are denoised; others are conditions, such as a mask.
        trail: by step, samples `[B, D]` of the latents and of each output.
        lengths: of the last two steps, as relative changes of the latents.
        lanes: one for each condition.
    """

    index: int
    latents: Tensor
    channels: int = 0
    trail: deque[list[Tensor]] = field(default_factory=lambda: deque([[]], maxlen=MEMORY))
    lengths: tuple[float, float] = (0.0, 0.0)
    lanes: list[Lane] = field(default_factory=list)

    def distance(self, latents: Tensor, index: int) -> float:
        """The relative distance of `latents` from the nearest ones that this picture could have at step `index`."""
        if latents.shape != self.latents.shape or latents.dtype != self.latents.dtype:
            return math.inf
        if index == self.index:
            return 0.0 if torch.equal(latents, self.latents) else math.inf
        if index > self.index + 1 or not self.trail[-1]:
            return math.inf
        if not torch.equal(latents[:, self.channels :], self.latents[:, self.channels :]):
            return math.inf
        return _distance_to_span(self._sampled(latents), [x for step in self.trail for x in step])

    def advance(self, latents: Tensor, index: int) -> None:
        """Come to a call with `latents` at step `index`."""
        if index > self.index:
            change = largest_change(self.latents[:, : self.channels], latents[:, : self.channels])
            self.lengths = self.lengths[1], float(change)
            self.index, self.latents = index, latents.detach().clone()
            self.trail.append([])

    def growth(self) -> float:
        """The expected ratio of the next step's length to the last one's, from 1 to 2; 1 if steps are nearly even."""
        before, last = self.lengths
        ratio = last / before if before else 1.0
        return min(ratio, 2.0) if ratio > EVEN else 1.0

    def next_length(self) -> float:
        """The expected length of the next step, if steps keep growing as they did."""
        return max(self.lengths) * self.growth()

    def lane(self, inputs: Inputs) -> Lane:
        """The lane that a call continues; each serves one call a step."""
        lane = next((lane for lane in self.waiting() if lane.inputs.same_conditions(inputs)), None)
        if lane is None:
            lane = Lane(inputs.clone(), self.index)
            self.lanes = [*(each for each in self.lanes if each.index >= self.index - 1), lane]
        lane.index = self.index
        return lane

    def waiting(self) -> list[Lane]:
        """The lanes that no call of this step has continued yet."""
        return [lane for lane in self.lanes if lane.index == self.index - 1]

    def learn(self, output: Tensor) -> None:
        """Add an output to the tensors that the next latents can be a sum of.

        It is like the latents, `[B, C, ...]`. Of packed latents it is `[B, N, C]`, and those of references may follow.
        """
        if self.latents.ndim == 3:
            output = output[:, : self.latents.shape[2]].mT
        self.channels = min(output.shape[1], self.latents.shape[1])
        if not self.trail[-1]:
            self.trail[-1].append(self._sampled(self.latents))
        parts = _equal_parts(self.latents)
        self.trail[-1] += [self._sampled(part).repeat(parts, 1) for part in output.chunk(parts)]

    def _sampled(self, x: Tensor) -> Tensor:
        """`[B, D]`: some of the values of `x` `[B, C, ...]`."""
        values = x.detach()[:, : self.channels].flatten(1)
        return values[:, :: values.shape[1] // SAMPLES | 1].float()


def _nothing(returned: Any) -> None:
    """Learn nothing from what a call returned."""


@dataclass
class Visit:
    """One call of a network.

    Attributes:
        output: the forecast, in the form that the network returns; None: the network must run.
        reason: why it must run; "" otherwise.
        end: to be called with what the call returned.
    """

    output: Any = None
    reason: str = ""
    end: Callable[[Any], None] = _nothing


class Forecasts:
    """The forecasts of one run, of any number of pictures.

    Args:
        first: the step of its first call.
        tolerance: a call is forecast if that is expected to change the latents by at most its step's share of this.
        never: why nothing may be forecast in this run; "" if something may be.
    """

    def __init__(self, first: int, tolerance: float, never: str = "") -> None:
        self._first = first
        self._tolerance = tolerance
        self._never = never
        self._pictures: list[Picture] = []

    def visit(self, inputs: Inputs, step: Step) -> Visit:
        """A call at `step`."""
        if reason := self._reason(inputs):
            return Visit(reason=reason)
        picture = self._picture(inputs.latents, step.index)
        lane = picture.lane(inputs)
        reason = self._reason_now(picture, lane, step)
        output = None if reason else lane.forecast(step.index)
        return Visit(output, reason, partial(_learn, picture, lane, is_forecast=not reason))

    def will_forecast(self, inputs: Inputs, step: Step) -> bool:
        """Whether `visit` will forecast the calls that continue those of the step before, with these latents."""
        if self._reason(inputs):
            return False
        picture = self._picture(inputs.latents, step.index)
        waiting = picture.waiting()
        return bool(waiting) and not any(self._reason_now(picture, lane, step) for lane in waiting)

    def _reason(self, inputs: Inputs) -> str:
        """Why no call with these inputs is forecast; "" if one may be."""
        computable = inputs.readable and not torch.is_grad_enabled()
        return self._never if computable else "gradients are recorded, or values unreadable"

    def _reason_now(self, picture: Picture, lane: Lane, step: Step) -> str:
        """Why this call is not forecast; "" if it is."""
        if step.is_last or step.index <= self._first + 1:
            return "the first two steps and the last are computed"
        if len(lane.outputs) < 2:
            return "latents did not follow from the outputs before, as when the sampler adds noise"
        # As steps grow, the remainder of an output that is smooth along the latents' path grows with a power of theirs.
        error = lane.expected_error(picture.index) * picture.growth() ** (ORDER + 1)
        is_far = lane.skipped == len(lane.outputs) - 1  # at most `ORDER` calls in a row are skipped
        change = error * picture.next_length() * (lane.skipped + 1) ** 2
        if is_far or change > self._tolerance * step.share:
            return "forecasts were not accurate enough"
        return ""

    def _picture(self, latents: Tensor, index: int) -> Picture:
        """The one that `latents` belong to, or a new one; comes to step `index`."""
        self._pictures = [each for each in self._pictures if each.index >= index - 1][-MAX_PICTURES:]
        distances = [picture.distance(latents, index) for picture in self._pictures]
        nearest = min(distances, default=math.inf)
        if nearest > 1e-3 + 2 * torch.finfo(latents.dtype).eps:
            self._pictures.append(Picture(index, latents.detach().clone()))
            return self._pictures[-1]
        picture = self._pictures[distances.index(nearest)]
        picture.advance(latents, index)
        return picture


def _learn(picture: Picture, lane: Lane, returned: Any, *, is_forecast: bool) -> None:
    """Learn from what a call returned."""
    if len(returned) != 1:
        return
    picture.learn(output_of(returned))
    if is_forecast:
        lane.skipped += 1
    else:
        lane.learn(picture.index, returned)


def _distance_to_span(x: Tensor, columns: Sequence[Tensor]) -> float:
    """The largest distance of an item of `x` `[B, D]` from the span of its `columns`, relative to its norm."""
    *basis, target = torch.stack([*columns, x], dim=-1).cpu().split([len(columns), 1], dim=-1)
    q = torch.linalg.qr(basis[0]).Q
    return float(largest_change(target, q @ (q.mT @ target)))


def _equal_parts(latents: Tensor) -> int:
    """How many times the batch repeats the same latents, as parts of guidance do."""
    sizes = [parts for parts in range(4, 1, -1) if len(latents) % parts == 0]
    return next((n for n in sizes if all(torch.equal(latents.chunk(n)[0], x) for x in latents.chunk(n)[1:])), 1)


def why_never(timestep: Tensor, moment: Moment | None) -> str:
    """Why nothing may be forecast in a run that begins so; "" if something may be."""
    if moment is None:
        return ""
    if moment.count < FEWEST_STEPS:
        return f"runs of fewer than {FEWEST_STEPS} steps are computed"
    return "the sampler repeats its timesteps" if _in_pairs(timestep, moment.count) else ""


def _in_pairs(timestep: Tensor, count: int) -> bool:
    """Whether all timesteps but the first come in pairs, as for Heun's method."""
    if timestep.is_meta:
        return False
    times = timestep.as_strided((count,), (1,), 0).tolist()
    return count > 2 and times[1:-1:2] == times[2::2]
