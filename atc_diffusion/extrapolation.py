"""Polynomial extrapolation of a network's outputs under one condition, and its expected error."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from atc_diffusion.inputs import Inputs

ORDER = 2  # of the polynomial


@dataclass
class Lane:
    """The calls for one picture under one condition, such as a prompt.

    Attributes:
        inputs: of its first call.
        index: the step of its last call.
        outputs: the last computed ones, with their steps.
        template: what the network last returned; a forecast has the same form.
        nodes: how many outputs the forecast for the last computed step was made from.
        rates: its error and, if made from as many, that of the forecast before, relative to output and remainder;
            scalar tensors.
        skipped: how many of the last calls were forecast.
    """

    inputs: Inputs
    index: int
    outputs: list[tuple[int, Tensor]] = field(default_factory=list)
    template: Any = None
    nodes: int = 0
    rates: tuple[Tensor, ...] = ()
    skipped: int = 0

    @property
    def steps(self) -> list[int]:
        return [step for step, _ in self.outputs]

    def forecast(self, index: int) -> Any:
        """The output at step `index`, in the form that the network returns."""
        output: Any = self._extrapolated(index)
        if isinstance(self.template[0], list):
            output = list(output)
        if isinstance(self.template, tuple):
            return (output,)
        return type(self.template)(**dict.fromkeys(self.template, output))

    def expected_error(self, index: int) -> float:
        """The expected relative error of a forecast for step `index`, if errors keep growing as they did."""
        if not self.rates:
            return math.inf
        rate, before = float(self.rates[0]), float(self.rates[-1])
        growth = max(rate / before, 1.0) if before else 1.0
        return rate * growth * _remainder(self.steps[-self.nodes :], index)

    def learn(self, index: int, returned: Any) -> None:
        """Remember what the network returned at step `index`."""
        output = output_of(returned)
        if self.outputs:
            rate = largest_change(output, self._extrapolated(index)) / _remainder(self.steps, index)
            self.rates = (rate, *self.rates[:1]) if self.nodes == len(self.outputs) else (rate,)
            self.nodes = len(self.outputs)
        self.outputs = [*self.outputs[-ORDER:], (index, output.clone())]
        self.template, self.skipped = returned, 0

    def _extrapolated(self, index: int) -> Tensor:
        weights = lagrange(self.steps, index)
        terms = [weight * output.float() for weight, (_, output) in zip(weights, self.outputs, strict=True)]
        return torch.stack(terms).sum(dim=0).to(self.outputs[-1][1].dtype)


def output_of(returned: Any) -> Tensor:
    """The output `[B, ...]` of a network that returned a tensor or, like Z-Image's, a list with one for each item."""
    output = returned[0]
    return (torch.stack(output) if isinstance(output, list) else output).detach()


def lagrange(steps: Sequence[int], index: int) -> list[float]:
    """The weights of values at `steps` in the value at `index` of the polynomial through them."""
    return [math.prod((index - other) / (step - other) for other in steps if other != step) for step in steps]


def _remainder(steps: Sequence[int], index: int) -> float:
    """The factor of the interpolation error that depends on the `steps` and on `index`."""
    return float(math.prod(abs(index - step) for step in steps))


def largest_change(x: Tensor, y: Tensor) -> Tensor:
    """Of the items of `x` and `y` `[B, ...]`: the largest norm of the difference, relative to `x`."""
    x, y = x.float().flatten(1), y.float().flatten(1)
    return ((x - y).norm(dim=1) / x.norm(dim=1).clamp(min=torch.finfo(torch.float32).tiny)).max()
