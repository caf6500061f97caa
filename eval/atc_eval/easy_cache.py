"""EasyCache (Zhou et al. 2025, arXiv 2507.02860): reuses what a network added to its input while that changes little.

Written after the paper, section 3.3. How much an output changes is expected from how much the input did, and from the
ratio of both at the last two steps that were computed.
"""

from typing import Any

from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor

WARM_UP = 0.15  # of the steps, which are computed at first


class EasyCache:
    """A UNet's `forward` that runs only at some of the steps.

    Args:
        unet: with one call a step.
        threshold: the relative change of the output, summed over skipped steps, at which the network runs again.
    """

    def __init__(self, unet: Any, threshold: float) -> None:
        self._unet = unet
        self._threshold = threshold
        self._inner = unet.forward
        unet.forward = self._forward
        self.start(num_steps=1)

    def start(self, num_steps: int) -> None:
        """Begin a run of `num_steps`."""
        self._num_steps = num_steps
        self._step = 0
        self._change = self._rate = 0.0
        self._latents: Tensor | None = None  # of the step before
        self._computed: tuple[Tensor, Tensor] | None = None  # the last input and output that were computed

    def remove(self) -> None:
        del self._unet.forward

    def _forward(self, latents: Tensor, *args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
        output = self._reused(latents)
        if output is None:
            output = self._inner(latents, *args, return_dict=False, **kwargs)[0]
            self._learn(latents, output)
        self._latents = latents
        self._step += 1
        return UNet2DConditionOutput(output) if return_dict else (output,)

    def _reused(self, latents: Tensor) -> Tensor | None:
        """The output without running, or None if the network must run."""
        if self._computed is None or self._latents is None or not self._rate:
            return None
        before, output = self._computed
        self._change += self._rate * _size(latents - self._latents) / _size(output)
        is_inner = WARM_UP * self._num_steps <= self._step < self._num_steps - 1
        return latents + (output - before) if is_inner and self._change < self._threshold else None

    def _learn(self, latents: Tensor, output: Tensor) -> None:
        if self._computed is not None:
            before, earlier = self._computed
            self._rate = _size(output - earlier) / _size(latents - before)
        self._computed, self._change = (latents, output), 0.0


def _size(x: Tensor) -> float:
    return float(x.abs().mean())
