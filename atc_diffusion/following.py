"""Skips the calls of a ControlNet where the output of the network that it serves is forecast."""

from functools import partial
from typing import Any

import torch

from atc_diffusion.forecast import Forecasts, Visit
from atc_diffusion.inputs import Inputs
from atc_diffusion.moment import Step

MAX_CONDITIONS = 256  # a loop over more of them forgets the oldest


class Following:
    """The calls of a ControlNet in one run."""

    def __init__(self) -> None:
        self._computed: list[Inputs] = []
        self._returned: dict[object, Any] = {}

    def visit(self, denoiser: Forecasts | None, inputs: Inputs, step: Step) -> Visit:
        """A call at a step of the denoiser's. If that will be forecast, only the shape of what this returns is read."""
        known = any(earlier.same_conditions(inputs) for earlier in self._computed)
        returned = self._returned.get(inputs.kind) if known else None
        if returned is not None and denoiser is not None and denoiser.will_forecast(inputs, step):
            return Visit(returned)
        end = self._forget if step.is_last else partial(self._remember, inputs, known)
        return Visit(reason="the denoiser is computed", end=end)

    def _forget(self, returned: Any) -> None:
        """At the last step: nothing is skipped after it, and a network remembers its last run."""
        self._computed.clear()
        self._returned.clear()

    def _remember(self, inputs: Inputs, known: bool, returned: Any) -> None:
        if torch.is_grad_enabled():  # nothing is skipped in training
            return
        if not known:
            self._computed = [*self._computed[1 - MAX_CONDITIONS :], inputs.clone()]
        self._returned[inputs.kind] = returned
