"""Where the denoising is, and which groupings of tokens still serve.

All of it is decided on the host, from what is known without waiting for the device.
"""

import weakref
from typing import Any

import torch
from torch import Tensor

from atc_diffusion.config import MergeConfig
from atc_diffusion.merge_map import MergeMap

Moment = tuple[int, float]  # a schedule, and a position that grows along it


class Run:
    """Follows one UNet through its calls.

    Attributes:
        timestep: scalar tensor, the present one.
        progress: how much of the schedule lies behind it, from 0 to 1; None if that cannot be told.
    """

    def __init__(self, config: MergeConfig) -> None:
        self.config = config
        self.timestep = torch.tensor(0.0)
        self.progress: float | None = 0.0
        self._moment: Moment | None = None
        self._prompts: list[_Prompt] = []
        self._present: _Prompt | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Copies, and what is read from a file, begin afresh."""
        return self.__dict__ | {"_prompts": [], "_present": None}

    @property
    def merge_maps(self) -> dict[str, MergeMap]:
        """What the layers found in this call, or in an earlier one whose groupings still serve; by layer."""
        return {} if self._present is None else self._present.merge_maps

    @property
    def guidance_parts(self) -> int:
        """How many parts of the batch are the same picture under different guidance; 1 if unknown."""
        return 1 if self._present is None else self._present.guidance_parts

    def begin(self, sample: Tensor, timestep: Tensor | float, text: Tensor) -> bool:
        """Make ready for a call of the UNet with `sample` `[B, C, H, W]`; tell whether a new run begins."""
        moment, before = _moment(timestep), self._moment
        is_new = self._present is not None or before is None or moment is None or _goes_back(before, moment)
        if is_new:
            self._prompts.clear()
        prompt = self._prompt(text)
        prompt.advance(sample, moment, self.config)
        self._present = prompt
        self.timestep = torch.as_tensor(timestep).float().max()
        self.progress = _progress(timestep)
        self._moment = moment
        return is_new

    def end(self) -> None:
        """The call returned. Where it did not, for an exception, the next one begins a new run."""
        self._present = None

    def _prompt(self, text: Tensor) -> "_Prompt":
        """The state of the calls with this very tensor: guidance may call the UNet for each half in turn."""
        self._prompts = [prompt for prompt in self._prompts if prompt.text() is not None]
        for prompt in self._prompts:
            if prompt.text() is text:
                return prompt
        self._prompts.append(_Prompt(text))
        return self._prompts[-1]


class _Prompt:
    """The calls of a run that have the same text."""

    def __init__(self, text: Tensor) -> None:
        self.text = weakref.ref(text)
        self.merge_maps: dict[str, MergeMap] = {}
        self.guidance_parts = 1
        self._age = 0  # steps that the maps have served
        self._calls = 0
        self._moment: Moment | None = None
        self._kind: tuple[object, ...] = ()

    def advance(self, sample: Tensor, moment: Moment | None, config: MergeConfig) -> None:
        kind = (sample.shape, sample.dtype, sample.device)
        if kind != self._kind:
            self._calls, self.guidance_parts = 0, 1
        self._age += 1
        # The same moment again is a second look by the scheduler, or a new run of a single step.
        if kind != self._kind or moment is None or moment == self._moment or self._age >= config.refresh_every:
            self.merge_maps, self._age = {}, 0
        if config.share_guidance and self._calls == 1:
            # Now, not at the first call: there, different prompts of one seed have equal latents too.
            self.guidance_parts = next((parts for parts in (3, 2) if _are_equal(sample, parts)), 1)
        self._kind, self._moment = kind, moment
        self._calls += 1


def _moment(timestep: Tensor | float) -> Moment | None:
    """When in its schedule a timestep is; None if that is known to another device alone."""
    if not isinstance(timestep, Tensor) or timestep.device.type == "cpu":
        return 0, -float(torch.as_tensor(timestep).max())
    storage = timestep.untyped_storage()
    if timestep.numel() == 1 and storage.nbytes() > timestep.itemsize:  # an entry of scheduler.timesteps
        return storage.data_ptr(), int(timestep.storage_offset())
    return None


def _progress(timestep: Tensor | float) -> float | None:
    """How much of the denoising lies behind, from 0 (noise) to 1, without waiting for the device.

    By its place in scheduler.timesteps, if it is an entry of that; else by its value in a schedule from 1000 to 0, if
    that is known here.
    """
    if isinstance(timestep, Tensor):
        places = timestep.untyped_storage().nbytes() // timestep.itemsize
        if places > timestep.numel() == 1:
            return int(timestep.storage_offset()) / (places - 1)
        if timestep.device.type != "cpu":
            return None
    return min(max(1 - float(torch.as_tensor(timestep).max()) / 1000, 0.0), 1.0)


def _goes_back(before: Moment, now: Moment) -> bool:
    return now[0] != before[0] or now[1] < before[1]


def _are_equal(sample: Tensor, parts: int) -> bool:
    """Whether the latents, the first four channels of `sample` `[B, C, H, W]`, are `parts` times the same."""
    if len(sample) % parts:
        return False
    first, *others = sample[:, :4].chunk(parts)
    return all(torch.equal(first, other) for other in others)
