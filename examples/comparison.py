"""Draws one image twice, unmerged and merged, and compares the two."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from PIL import Image, ImageChops

from atc_diffusion import MergeConfig, patched, psnr, ssim, summary
from atc_diffusion.clustering import on_compilation
from pipeline import Partition, draw_images, partitions

OnStep = Callable[[str, int], None]  # called with the drawing's name and the steps done; may raise to end the run


@dataclass(frozen=True)
class Settings:
    """What a comparison draws; `code` makes `config`."""

    prompt: str
    seed: int
    steps: int
    size: int
    config: MergeConfig
    code: str


@dataclass(frozen=True)
class Comparison:
    """The two images and the seconds that each took, what merging saved and what it merged."""

    settings: Settings
    unmerged: Image.Image
    merged: Image.Image
    unmerged_seconds: float
    merged_seconds: float
    work_saved: float  # of the patched attentions' arithmetic, a fraction
    partitions: list[Partition]

    @property
    def ratio(self) -> float:
        """Time with merging, as a fraction of the time without."""
        return self.merged_seconds / self.unmerged_seconds

    @property
    def psnr(self) -> float:
        """Peak signal-to-noise ratio in dB of the merged image to the unmerged one; infinite if they are equal."""
        return psnr(self.unmerged, self.merged)

    @property
    def ssim(self) -> float:
        """Structural similarity of the two, 1 if they are equal."""
        return ssim(self.unmerged, self.merged)

    @property
    def gain(self) -> int:
        """How many times `difference` is stronger than it is, so that its strongest thousandth is at full strength."""
        return int(255 // max(1.0, np.percentile(np.asarray(self._error), 99.9)))

    @property
    def difference(self) -> Image.Image:
        """Absolute difference of the two, `gain` times as strong, cut off at white."""
        gain = self.gain
        return self._error.point(lambda value: gain * value)

    @property
    def _error(self) -> Image.Image:
        return ImageChops.difference(self.unmerged, self.merged)


class Studio:
    """One pipeline that several threads draw with, each in its turn; `options` go to all its calls."""

    def __init__(self, pipe: Any, **options: Any) -> None:
        self.pipe = pipe
        self.options = options
        self._turn = threading.Lock()  # a patch is on the model, which all threads share

    @property
    def size(self) -> int:
        """Side in pixels of the images that the model was made for."""
        network = getattr(self.pipe, "unet", None) or self.pipe.transformer
        return int(network.config.sample_size * self.pipe.vae_scale_factor)

    def compare(self, settings: Settings, on_step: OnStep) -> Comparison:
        """Draw unmerged, then merged, each after one step that is not timed.

        The pipeline is left unpatched, whatever `on_step` or the pipeline raises.
        """
        config = replace(settings.config, record=True)
        with self._turn:
            on_step("Unmerged", 0)
            self._warm_up(settings)
            unmerged, unmerged_seconds = self._draw(settings, partial(on_step, "Unmerged"))
            on_step("Merged", 0)
            with patched(self.pipe, config), on_compilation(partial(on_step, "Compiling (once), then the merged", 0)):
                self._warm_up(settings)
            with patched(self.pipe, config):
                merged, merged_seconds = self._draw(settings, partial(on_step, "Merged"))
                work_saved, found = summary(self.pipe).work_saved, partitions(self.pipe)
        return Comparison(settings, unmerged, merged, unmerged_seconds, merged_seconds, work_saved, found)

    def _warm_up(self, settings: Settings) -> None:
        self._draw(replace(settings, steps=1), lambda done: None)

    def _draw(self, settings: Settings, on_step: Callable[[int], None]) -> tuple[Image.Image, float]:
        given = [settings.prompt], settings.seed, settings.size, settings.steps
        on_end = partial(_after_step, on_step)
        [image], seconds = draw_images(self.pipe, *given, callback_on_step_end=on_end, **self.options)
        return image, seconds


def _after_step(on_step: Callable[[int], None], pipe: Any, step: int, timestep: Any, tensors: Any) -> Any:
    """A `callback_on_step_end` that changes no tensor."""
    on_step(step + 1)
    return tensors
