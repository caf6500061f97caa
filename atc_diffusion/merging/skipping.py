"""Whether the calls of a patched network are made: by what is forecast for it, or for the network that it serves."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from atc_diffusion.adapters import Family
from atc_diffusion.adapters.noise import bearable_roughness
from atc_diffusion.calls.forward import WatchedForward, Watcher
from atc_diffusion.calls.inputs import Inputs
from atc_diffusion.calls.position import Position, is_mixed
from atc_diffusion.calls.reference import Reference
from atc_diffusion.calls.state import NetworkState
from atc_diffusion.forecasting import Decision, Forecaster
from atc_diffusion.forecasting.deferred import is_forced
from atc_diffusion.merging.runs import Run


@dataclass(eq=False)
class Skipping:
    """Decides which calls of one network are made.

    Attributes:
        network: the network.
        owner: its patch, which skips the calls.
        family: its adapter.
        tolerance: the error budget of a run.
        state: of the network.
        sees_last_arguments: whether no hook that was registered later can change the arguments.
        pipeline: refers to the network's pipeline, whose scheduler may be exchanged, or to nothing.
        denoiser: refers to the patch of the network that a ControlNet serves, or to nothing.
        is_controlnet: whether it is a ControlNet, which is called with the latents of the network that it serves.
    """

    network: nn.Module
    owner: Watcher
    family: Family
    tolerance: float
    state: NetworkState
    sees_last_arguments: Callable[[], bool]
    pipeline: Reference
    denoiser: Reference
    is_controlnet: bool

    def __post_init__(self) -> None:
        self.forward = WatchedForward(self.network, self.owner)

    def decide(self, run: Run, position: Position, inputs: Inputs, timestep: Any, call: partial[Any]) -> Decision:
        """Whether a `call` of the network at a `timestep` is made."""
        if is_forced(self.owner):
            return Decision()
        if run.forecasts is None:
            noise, roughness = self.family.noise(self._scheduler), bearable_roughness(self._scheduler)
            run.forecasts = Forecaster(self.family, noise, roughness, self.tolerance)
        if not self.is_controlnet:
            run.forecasts.meet(inputs, position)
        reason = self.never()
        if not reason and is_mixed(timestep, position):
            reason = "the images of the batch are at different timesteps"
        if reason:
            run.forecasts.refuse(position)
            return Decision(reason=reason)
        if (denoiser := self.denoiser()) is not None:
            return self._defer(denoiser, run, position, inputs, call)
        return run.forecasts.decide(inputs, position)

    def never(self) -> str:
        """Why no call is skipped at present; "" if one may be."""
        if not self.forward.is_trusted:
            self.forward.mend()
            return "the network's forward was replaced, as by a cache"
        if not self.sees_last_arguments():
            return "a hook was registered after the patch, and may change the arguments"
        if stranger := self.state.stranger():
            return f"{stranger} may have to see every step"
        if not bearable_roughness(self._scheduler):
            return "the sampler weighs several earlier steps, which would magnify errors"
        return ""

    @property
    def _scheduler(self) -> Any:
        return getattr(self.pipeline(), "scheduler", None)

    def _defer(self, denoiser: Any, run: Run, position: Position, inputs: Inputs, call: partial[Any]) -> Decision:
        """A ControlNet's call, put off where the coming one of its denoiser will probably be forecast."""
        served = denoiser.runs.present(position.entry, position.time)
        if served is not None and served.forecasts is not None and inputs.readable and not torch.is_grad_enabled():
            coming = served.position_at(position.entry, position.time)
            if not denoiser.skipping.never() and served.forecasts.expects(inputs, coming):
                put_off = run.deferrals.put_off(inputs, call, self.owner)
                if put_off is not None:
                    return Decision(put_off)
        return Decision(reason="the denoiser is computed", end=partial(run.deferrals.remember, inputs))
