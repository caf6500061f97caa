"""Spectrum (Han et al. 2026, arXiv 2603.01623): forecasts the features that a UNet's last layers get.

Follows the authors' code for SDXL and its settings (github.com/hanjq17/Spectrum). The forecast is the mean of two: a
Chebyshev series fitted to all computed steps by ridge regression, and the line through the last two of them.
"""

from typing import Any

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from numpy.polynomial.chebyshev import chebvander
from torch import Tensor

WARM_UP = 5  # steps that are computed at first
WINDOW = 2.0  # steps for each that is computed after the warm-up; it grows with each of them
DEGREE = 4
RIDGE = 0.1


class Spectrum:
    """A UNet's `forward` that runs only at some of the steps.

    Args:
        unet: with one call a step.
        growth: of the window, at each step that is computed.
    """

    def __init__(self, unet: Any, growth: float) -> None:
        self._unet = unet
        self._growth = growth
        self._inner = unet.forward
        self._hook = unet.conv_norm_out.register_forward_pre_hook(self._note)
        unet.forward = self._forward
        self.start(num_steps=1)

    def start(self, num_steps: int) -> None:
        """Begin a run of `num_steps`."""
        self._num_steps = num_steps
        self._step = self._skipped = 0
        self._window = WINDOW
        self._features: dict[int, Tensor] = {}

    def remove(self) -> None:
        self._hook.remove()
        del self._unet.forward

    def _note(self, module: torch.nn.Module, args: tuple[Tensor]) -> None:
        if not self._skipped:
            self._features[self._step] = args[0]

    def _forward(self, *args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
        is_warm = self._step >= WARM_UP
        is_computed = not is_warm or (self._skipped + 1) % int(self._window) == 0
        self._window += self._growth * (is_computed and is_warm)
        self._skipped = 0 if is_computed else self._skipped + 1
        output = self._inner(*args, return_dict=False, **kwargs)[0] if is_computed else self._last_layers()
        self._step += 1
        return UNet2DConditionOutput(output) if return_dict else (output,)

    def _last_layers(self) -> Tensor:
        forecast = (self._series() + self._line()) / 2
        return self._unet.conv_out(self._unet.conv_act(self._unet.conv_norm_out(forecast)))

    def _series(self) -> Tensor:
        steps, features = torch.tensor(list(self._features)), torch.stack(list(self._features.values()))
        x, target = self._basis(steps), self._basis(torch.tensor([self._step]))
        weights = target @ torch.linalg.solve(x.mT @ x + RIDGE * torch.eye(DEGREE + 1, dtype=x.dtype), x.mT)
        return torch.einsum("k,k...->...", weights[0].to(features), features)

    def _basis(self, steps: Tensor) -> Tensor:
        """Chebyshev polynomials `[K, DEGREE + 1]` at `steps` `[K]`, where the run is from -1 to 1."""
        return torch.from_numpy(chebvander(2 * steps.double().numpy() / self._num_steps - 1, DEGREE))

    def _line(self) -> Tensor:
        before, last = list(self._features)[-2:]
        slope = (self._features[last] - self._features[before]) / (last - before)
        return self._features[last] + (self._step - last) * slope
