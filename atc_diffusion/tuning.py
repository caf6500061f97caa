"""Find the fastest setting that keeps a pipeline's pictures: merging, forecasting, fewer steps, and combinations."""

import inspect
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from atc_diffusion.config import ATCConfig, MergeConfig
from atc_diffusion.patch import patched, remove_patch

FASTER = 0.97  # of the unmerged time; anything nearer to 1 may be noise
DOUBT = 5.0  # dB that one picture may be from the mean of several
FAILURES = (RuntimeError, AttributeError, KeyError, TypeError, ValueError)  # of a way that a model or device lacks

OnProgress = Callable[[str, int, int], None]  # what is drawn now, how many pictures are done, and of how many


@dataclass(frozen=True)
class Way:
    """One way of drawing pictures.

    Attributes:
        config: how the pipeline is patched; None: not at all.
        num_inference_steps: how many steps are asked for.
    """

    config: MergeConfig | None
    num_inference_steps: int

    def __str__(self) -> str:
        parts = [] if self.config is None else _parts(self.config)
        return " + ".join([*parts, f"{self.num_inference_steps} steps"])


def _parts(config: MergeConfig) -> list[str]:
    merging = [f"r={config.r}, r_keys={config.r_keys}"] if (config.r, config.r_keys) not in ((1, None), (1, 1)) else []
    return merging + (["forecasting"] if config.forecast_tolerance else [])


@dataclass(frozen=True)
class Row:
    """How one way of drawing did.

    Attributes:
        way: which.
        seconds: per call of the pipeline, the median.
        ratio: of these to the unpatched pipeline's for the same prompt, the median.
        psnr: in dB, to the unpatched pipeline's pictures, the mean; infinite if they are equal.
        pictures: how many prompts were drawn.
    """

    way: Way
    seconds: float
    ratio: float
    psnr: float
    pictures: int

    def __str__(self) -> str:
        return f"{self.way!s:48} {self.seconds:8.2f} s  x {self.ratio:.2f}  {self.psnr:5.1f} dB"


@dataclass(frozen=True)
class Tuning:
    """What `tune` found; prints as a table with advice.

    Attributes:
        rows: of all ways that were tried, the fastest first.
        min_psnr: the least PSNR that was asked for.
    """

    rows: tuple[Row, ...]
    min_psnr: float

    @property
    def best(self) -> Row:
        """The fastest way that is near enough; the unpatched pipeline if none is faster."""
        good = [row for row in self.rows if row.psnr >= self.min_psnr and row.ratio < FASTER]
        return good[0] if good else next(row for row in self.rows if row.way.config is None and math.isinf(row.psnr))

    @property
    def config(self) -> MergeConfig:
        """For `apply_patch`; where no patch pays, one that changes nothing."""
        return self.best.way.config or ATCConfig(r=1.0)

    @property
    def num_inference_steps(self) -> int:
        """To be asked for together with `config`."""
        return self.best.way.num_inference_steps

    def __str__(self) -> str:
        best = f"fastest at {self.min_psnr:g} dB or more: {self.best.way} (x {self.best.ratio:.2f})"
        code = f"apply_patch(pipe, {self.config})\npipe(..., num_inference_steps={self.num_inference_steps})"
        return "\n".join([*map(str, self.rows), best, code])


@dataclass
class _Trials:
    """The pictures drawn so far; the first way is the unpatched pipeline."""

    seconds: dict[Way, list[float]] = field(default_factory=dict)
    ratios: dict[Way, list[float]] = field(default_factory=dict)
    psnrs: dict[Way, list[float]] = field(default_factory=dict)

    def add(self, way: Way, seconds: float, unpatched: float, psnr: float) -> None:
        for values, value in ((self.seconds, seconds), (self.ratios, seconds / unpatched), (self.psnrs, psnr)):
            values.setdefault(way, []).append(value)

    def rows(self) -> tuple[Row, ...]:
        return tuple(sorted(map(self._row, self.seconds), key=lambda row: row.ratio))

    def promising(self, ways: Sequence[Way], min_psnr: float) -> list[Way]:
        """Those that may still be the answer."""
        rows = {row.way: row for row in self.rows()}
        return [way for way in ways if way in rows and rows[way].ratio < 1 and rows[way].psnr >= min_psnr - DOUBT]

    def _row(self, way: Way) -> Row:
        median = statistics.median
        psnrs = self.psnrs[way]
        return Row(way, median(self.seconds[way]), median(self.ratios[way]), statistics.fmean(psnrs), len(psnrs))


def tune(
    pipe: Any,
    prompts: str | Sequence[str],
    *,
    min_psnr: float = 40.0,
    max_seconds: float = math.inf,
    seed: int = 0,
    on_progress: OnProgress | None = None,
    **arguments: Any,
) -> Tuning:
    """Draw pictures with merging, with forecast steps, with fewer steps and with combinations, and compare them.

    What is slower than the unpatched pipeline, or far from its pictures, is drawn for the first prompt only. The
    pipeline is left as it was, with the patch that it had.

    Args:
        pipe: a pipeline that `apply_patch` takes, and that returns `images`.
        prompts: a few prompts, each drawn by a call of its own.
        min_psnr: the least PSNR, in dB, to the unpatched pipeline's pictures.
        max_seconds: no picture is begun after that, but the unpatched one of the first prompt and one other.
        seed: of the first prompt's noise; each prompt has the next.
        on_progress: called before each picture.
        arguments: of the pipeline's call, such as `num_inference_steps`, `guidance_scale`, `height`, or `image`.

    Returns:
        a `Tuning`: `apply_patch(pipe, tuning.config)`, and draw with `num_inference_steps=tuning.num_inference_steps`.

    Raises:
        ValueError: if there is no prompt, or the pipeline cannot be patched.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not prompts:
        raise ValueError("prompts must be a prompt or several, got none")
    steps = arguments.pop("num_inference_steps", None) or _default_steps(pipe)
    bench = _Bench(pipe, arguments, seed, time.perf_counter() + max_seconds, on_progress or _ignore)
    with patched(pipe, ATCConfig.faster()):  # restores the present patch in the end
        bench.warm_up(prompts[0])
        remove_patch(pipe)
        return Tuning(bench.compare(prompts, list(_ways(steps)), min_psnr).rows(), min_psnr)


def _ways(steps: int) -> Iterator[Way]:
    """The unpatched pipeline, then what is tried, the most promising first."""
    fast, faster = ATCConfig.fast(), ATCConfig.faster()
    fewer = [max(1, round(share * steps)) for share in (0.8, 0.5)]
    yield Way(None, steps)
    for config in (
        faster,
        fast,
        ATCConfig(r=1.0, forecast_tolerance=faster.forecast_tolerance),
        replace(faster, r=0.5),
    ):
        yield Way(config, steps)
    yield Way(ATCConfig.fast(0.25), steps)
    for count in dict.fromkeys(fewer):
        if count < steps:
            yield from (Way(config, count) for config in (None, fast))


@dataclass
class _Bench:
    """Draws pictures of a pipeline with the same arguments, and takes the time."""

    pipe: Any
    arguments: dict[str, Any]
    seed: int
    end: float
    on_progress: OnProgress

    def warm_up(self, prompt: str) -> None:
        """Let everything compile, with the patch that is on and without."""
        self.on_progress("warming up", 0, 0)
        self._draw(prompt, 0, 2)
        remove_patch(self.pipe)
        self._draw(prompt, 0, 2)

    def compare(self, prompts: Sequence[str], ways: list[Way], min_psnr: float) -> _Trials:
        trials, (reference, *others), done = _Trials(), ways, 0
        for number, prompt in enumerate(prompts):
            if trials.seconds and time.perf_counter() > self.end:
                break
            total = done + (len(others) + 1) * (len(prompts) - number)
            self.on_progress(str(reference), done, total)
            expected, unpatched = self._timed(reference, prompt, number)
            trials.add(reference, unpatched, unpatched, math.inf)
            for way in others:
                done += 1
                if len(trials.seconds) > 1 and time.perf_counter() > self.end:
                    break
                self.on_progress(str(way), done, total)
                if drawn := self._attempt(way, prompt, number):
                    trials.add(way, drawn[1], unpatched, psnr(drawn[0], expected))
            done += 1
            others = trials.promising(others, min_psnr)
        return trials

    def _attempt(self, way: Way, prompt: str, number: int) -> tuple[Tensor, float] | None:
        """None, with a warning, if this way fails on this model or device."""
        try:
            return self._timed(way, prompt, number)
        except FAILURES as error:
            warnings.warn(f"left out {way}, which fails here: {error}", stacklevel=2)
            return None

    def _timed(self, way: Way, prompt: str, number: int) -> tuple[Tensor, float]:
        if way.config is None:
            return self._draw(prompt, number, way.num_inference_steps)
        with patched(self.pipe, way.config):
            return self._draw(prompt, number, way.num_inference_steps)

    def _draw(self, prompt: str, number: int, steps: int) -> tuple[Tensor, float]:
        """Pictures `[B, C, H, W]` from 0 to 1, and the seconds that they took."""
        generator = torch.Generator().manual_seed(self.seed + number)
        options = {"generator": generator, "output_type": "pt", "num_inference_steps": steps} | self.arguments
        start = time.perf_counter()
        images = self.pipe(prompt=prompt, **options).images.cpu()
        return images, time.perf_counter() - start


def psnr(images: Tensor, expected: Tensor) -> float:
    """Peak signal-to-noise ratio, in dB, of pictures from 0 to 1, rounded to 8 bits."""
    x, y = (255 * images.double()).round(), (255 * expected.double()).round()
    error = float((x - y).square().mean())
    return 10 * math.log10(255**2 / error) if error else math.inf


def _default_steps(pipe: Any) -> int:
    return int(inspect.signature(type(pipe).__call__).parameters["num_inference_steps"].default)


def _ignore(label: str, done: int, total: int) -> None: ...
