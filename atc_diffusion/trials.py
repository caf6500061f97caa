"""Compares ways of drawing a pipeline's images, in turn: their time, and how close their images are."""

import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL.Image import Image

from atc_diffusion.config import MergeConfig
from atc_diffusion.fidelity import psnr
from atc_diffusion.patch import patched, remove_patch

DOUBT = 5.0  # dB that one picture may be from the mean of several
FAILURES = (RuntimeError, AttributeError, KeyError, TypeError, ValueError)  # of a way that a model or device lacks

OnProgress = Callable[[str, int, int], None]  # what is drawn now, how many pictures are done, and of how many


@dataclass(frozen=True)
class Way:
    """One way of drawing pictures.

    Attributes:
        config: the patch; None: no patch.
        num_inference_steps: the number of steps that the pipeline is called with.
    """

    config: MergeConfig | None
    num_inference_steps: int

    def __str__(self) -> str:
        parts = [] if self.config is None else _parts(self.config)
        plural = "s" * (self.num_inference_steps != 1)
        return " + ".join([*parts, f"{self.num_inference_steps} step{plural}"])


def _parts(config: MergeConfig) -> list[str]:
    merging = [f"r={config.r}, r_keys={config.r_keys}"] if (config.r, config.r_keys) not in ((1, None), (1, 1)) else []
    return merging + (["forecasting"] if config.forecast_tolerance else [])


@dataclass(frozen=True)
class Row:
    """The measurements of one way of drawing.

    Attributes:
        way: the way.
        seconds: median time of a call of the pipeline.
        ratio: median ratio of that time to the unpatched pipeline's for the same prompt.
        psnr: mean PSNR in dB against the unpatched pipeline's images; infinite if they are equal.
        pictures: number of prompts that were drawn.
        image: the image of the first prompt.
    """

    way: Way
    seconds: float
    ratio: float
    psnr: float
    pictures: int
    image: Image | None = None

    def __str__(self) -> str:
        return f"{self.way!s:48} {self.seconds:8.2f} s  x {self.ratio:.2f}  {self.psnr:5.1f} dB"


@dataclass(frozen=True)
class Drawn:
    """The images that one call of the pipeline returned, and its time in seconds."""

    images: list[Image]
    seconds: float

    @property
    def pixels(self) -> Any:
        """`[B, H, W, C]`, 8 bits."""
        return np.stack([np.asarray(image) for image in self.images])


@dataclass
class Trials:
    """The pictures drawn so far; the first way is the unpatched pipeline."""

    seconds: dict[Way, list[float]] = field(default_factory=dict)
    ratios: dict[Way, list[float]] = field(default_factory=dict)
    psnrs: dict[Way, list[float]] = field(default_factory=dict)
    images: dict[Way, Image] = field(default_factory=dict)

    def add(self, way: Way, drawn: Drawn, unpatched: Drawn) -> None:
        ratio, nearness = drawn.seconds / unpatched.seconds, psnr(drawn.pixels, unpatched.pixels)
        for values, value in ((self.seconds, drawn.seconds), (self.ratios, ratio), (self.psnrs, nearness)):
            values.setdefault(way, []).append(value)
        self.images.setdefault(way, drawn.images[0])

    def rows(self) -> tuple[Row, ...]:
        return tuple(sorted(map(self._row, self.seconds), key=lambda row: row.ratio))

    def promising(self, ways: Sequence[Way], min_psnr: float) -> list[Way]:
        """The ways that may still turn out best."""
        rows = {row.way: row for row in self.rows()}
        return [way for way in ways if way in rows and rows[way].ratio < 1 and rows[way].psnr >= min_psnr - DOUBT]

    def _row(self, way: Way) -> Row:
        median = statistics.median
        psnrs, image = self.psnrs[way], self.images[way]
        return Row(way, median(self.seconds[way]), median(self.ratios[way]), statistics.fmean(psnrs), len(psnrs), image)


@dataclass
class Bench:
    """Draws pictures of a pipeline with the same arguments, and takes the time."""

    pipe: Any
    arguments: dict[str, Any]
    seed: int
    end: float
    on_progress: OnProgress

    def warm_up(self, prompt: str) -> None:
        """Compile everything, with the present patch and without."""
        self.on_progress("warming up", 0, 0)
        self._draw(prompt, 0, 2)
        remove_patch(self.pipe)
        self._draw(prompt, 0, 2)

    def compare(self, prompts: Sequence[str], ways: list[Way], min_psnr: float) -> Trials:
        trials, (reference, *others), done = Trials(), ways, 0
        for number, prompt in enumerate(prompts):
            if trials.seconds and time.perf_counter() > self.end:
                break
            total = done + (len(others) + 1) * (len(prompts) - number)
            self.on_progress(str(reference), done, total)
            unpatched = self._patched(reference, prompt, number)
            trials.add(reference, unpatched, unpatched)
            for way in others:
                done += 1
                if len(trials.seconds) > 1 and time.perf_counter() > self.end:
                    break
                self.on_progress(str(way), done, total)
                if drawn := self._attempt(way, prompt, number):
                    trials.add(way, drawn, unpatched)
            done += 1
            others = trials.promising(others, min_psnr)
        return trials

    def _attempt(self, way: Way, prompt: str, number: int) -> Drawn | None:
        """None, with a warning, if this way fails on this model or device."""
        try:
            return self._patched(way, prompt, number)
        except FAILURES as error:
            warnings.warn(f"left out {way}, which fails here: {error}", stacklevel=2)
            return None

    def _patched(self, way: Way, prompt: str, number: int) -> Drawn:
        if way.config is None:
            return self._draw(prompt, number, way.num_inference_steps)
        with patched(self.pipe, way.config):
            return self._draw(prompt, number, way.num_inference_steps)

    def _draw(self, prompt: str, number: int, steps: int) -> Drawn:
        options = {"generator": torch.Generator().manual_seed(self.seed + number), "num_inference_steps": steps}
        start = time.perf_counter()
        images = self.pipe(prompt=prompt, **options | self.arguments).images
        return Drawn(images, time.perf_counter() - start)
