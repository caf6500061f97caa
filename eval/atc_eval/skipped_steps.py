"""Two rivals that skip steps of a UNet: Spectrum and EasyCache."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from numpy.polynomial.chebyshev import chebvander
from torch import Tensor


class SkippedSteps(ABC):
    """A UNet's `forward` that runs only at some of the steps, one call a step, until `remove`."""

    def __init__(self, unet: Any, strength: float) -> None:
        self._unet = unet
        self._strength = strength
        self._inner = unet.forward
        unet.forward = self._forward
        self.start(num_steps=1)

    def start(self, num_steps: int) -> None:
        """Begin a run of `num_steps`."""
        self._num_steps = num_steps
        self._step = 0

    def remove(self) -> None:
        del self._unet.forward

    @classmethod
    @contextmanager
    def applied(cls, pipe: Any, strength: float) -> Iterator[Callable[..., Any]]:
        """Skip steps of a pipeline's UNet within a `with` block; yields the callable that draws."""
        skipping = cls(pipe.unet, strength)
        try:
            yield partial(skipping._draw, pipe)
        finally:
            skipping.remove()

    def _draw(self, pipe: Any, *args: Any, num_inference_steps: int, **kwargs: Any) -> Any:
        self.start(num_inference_steps)
        return pipe(*args, num_inference_steps=num_inference_steps, **kwargs)

    def _forward(self, latents: Tensor, *args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
        output = self._forecast(latents)
        if output is None:
            output = self._inner(latents, *args, return_dict=False, **kwargs)[0]
            self._learn(latents, output)
        self._step += 1
        return UNet2DConditionOutput(output) if return_dict else (output,)

    @abstractmethod
    def _forecast(self, latents: Tensor) -> Tensor | None:
        """The output of this step without running the network, or None if it must run."""

    @abstractmethod
    def _learn(self, latents: Tensor, output: Tensor) -> None:
        """Note what the network computed."""


class Spectrum(SkippedSteps):
    """Forecasts the features that a UNet's last layers get (Han et al. 2026, arXiv 2603.01623).

    Follows the authors' code for SDXL and its settings (github.com/hanjq17/Spectrum). The forecast is the mean of two:
    a Chebyshev series fitted to all computed steps by ridge regression, and the line through the last two of them.
    The strength is the growth of the window at each step that is computed after the warm-up.
    """

    WARM_UP = 5  # steps that are computed at first
    WINDOW = 2.0  # steps for each that is computed after the warm-up; it grows with each of them
    DEGREE = 4
    RIDGE = 0.1

    def __init__(self, unet: Any, strength: float) -> None:
        super().__init__(unet, strength)
        self._hook = unet.conv_norm_out.register_forward_pre_hook(self._note)

    def start(self, num_steps: int) -> None:
        super().start(num_steps)
        self._skipped, self._window = 0, self.WINDOW
        self._features: dict[int, Tensor] = {}

    def remove(self) -> None:
        super().remove()
        self._hook.remove()

    def _note(self, module: torch.nn.Module, args: tuple[Tensor]) -> None:
        if not self._skipped:
            self._features[self._step] = args[0]

    def _forecast(self, latents: Tensor) -> Tensor | None:
        if self._step < self.WARM_UP or (self._skipped + 1) % int(self._window) == 0:
            self._skipped = 0
            return None
        self._skipped += 1
        features = (self._series() + self._line()) / 2
        return self._unet.conv_out(self._unet.conv_act(self._unet.conv_norm_out(features)))

    def _learn(self, latents: Tensor, output: Tensor) -> None:
        self._window += self._strength * (self._step >= self.WARM_UP)

    def _series(self) -> Tensor:
        steps, features = torch.tensor(list(self._features)), torch.stack(list(self._features.values()))
        x, target = self._basis(steps), self._basis(torch.tensor([self._step]))
        ridge = self.RIDGE * torch.eye(self.DEGREE + 1, dtype=x.dtype)
        weights = target @ torch.linalg.solve(x.mT @ x + ridge, x.mT)
        return torch.einsum("k,k...->...", weights[0].to(features), features)

    def _basis(self, steps: Tensor) -> Tensor:
        """Chebyshev polynomials `[K, DEGREE + 1]` at `steps` `[K]`, where the run is from -1 to 1."""
        return torch.from_numpy(chebvander(2 * steps.double().numpy() / self._num_steps - 1, self.DEGREE))

    def _line(self) -> Tensor:
        before, last = list(self._features)[-2:]
        slope = (self._features[last] - self._features[before]) / (last - before)
        return self._features[last] + (self._step - last) * slope


class EasyCache(SkippedSteps):
    """Reuses what a network added to its input while that changes little (Zhou et al. 2025, arXiv 2507.02860).

    Written after the paper, section 3.3. How much an output changes is expected from how much the input did, and from
    the ratio of both at the last two steps that were computed. The strength is the relative change of the output,
    summed over skipped steps, at which the network runs again.
    """

    WARM_UP = 0.15  # of the steps, which are computed at first

    def start(self, num_steps: int) -> None:
        super().start(num_steps)
        self._change = self._rate = 0.0
        self._latents: Tensor | None = None  # of the step before
        self._computed: tuple[Tensor, Tensor] | None = None  # the last input and output that were computed

    def _forecast(self, latents: Tensor) -> Tensor | None:
        earlier, self._latents = self._latents, latents
        if self._computed is None or earlier is None or not self._rate:
            return None
        before, output = self._computed
        self._change += self._rate * _size(latents - earlier) / _size(output)
        is_inner = self.WARM_UP * self._num_steps <= self._step < self._num_steps - 1
        return latents + (output - before) if is_inner and self._change < self._strength else None

    def _learn(self, latents: Tensor, output: Tensor) -> None:
        if self._computed is not None:
            before, earlier = self._computed
            self._rate = _size(output - earlier) / _size(latents - before)
        self._computed, self._change = (latents, output), 0.0


def _size(x: Tensor) -> float:
    return float(x.abs().mean())
