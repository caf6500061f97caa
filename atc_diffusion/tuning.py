"""Finds the fastest setting that keeps a pipeline's images: merging, forecasting, fewer steps, and combinations."""

import inspect
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

from atc_diffusion.config import MergeConfig
from atc_diffusion.methods import ATCConfig
from atc_diffusion.patch import patched, remove_patch
from atc_diffusion.trials import Bench, OnProgress, Row, Way
from atc_diffusion.validation import check_count

FASTER = 0.97  # of the unmerged time; anything nearer to 1 may be noise


@dataclass(frozen=True)
class Tuning:
    """The result of `tune`; prints as a table with advice.

    Attributes:
        rows: one for each way that was tried, the fastest first.
        min_psnr: the lowest PSNR that was acceptable.
    """

    rows: tuple[Row, ...]
    min_psnr: float

    @property
    def best(self) -> Row:
        """The fastest way that is close enough, or the unpatched pipeline if none is faster."""
        good = [row for row in self.rows if row.psnr >= self.min_psnr and row.ratio < FASTER]
        return good[0] if good else next(row for row in self.rows if row.way.config is None and math.isinf(row.psnr))

    @property
    def config(self) -> MergeConfig:
        """For `apply_patch`; where no patch pays, one that changes nothing."""
        return self.best.way.config or ATCConfig(r=1.0)

    @property
    def num_inference_steps(self) -> int:
        """The number of steps to use together with `config`."""
        return self.best.way.num_inference_steps

    @property
    def advice(self) -> str:
        """In words, then as code."""
        if self.best.ratio < FASTER:
            words = f"Fastest at {self.min_psnr:g} dB or more: {self.best.way}, {self.best.ratio:.2f} of the time."
            code = f"apply_patch(pipe, {self.config})\npipe(..., num_inference_steps={self.num_inference_steps})"
            return f"{words}\n{code}"
        faster = [row for row in self.rows if row.ratio < FASTER]
        if not faster:
            return "Nothing is faster than the unpatched pipeline here."
        closest = max(faster, key=lambda row: row.psnr)
        return f"Nothing is faster at {self.min_psnr:g} dB or more. The closest: {closest.way}, {closest.psnr:.1f} dB."

    def __str__(self) -> str:
        return "\n".join([*map(str, self.rows), self.advice])


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
    """Compare merging, forecast steps, fewer steps and combinations of these on images of your own prompts.

    Settings that are slower than the unpatched pipeline, or far from its images, are drawn for the first prompt only.
    The pipeline is left as it was, with the patch that it had.

    Args:
        pipe: a pipeline that `apply_patch` supports and that returns `images`.
        prompts: a few prompts; each is drawn by a separate call.
        min_psnr: the lowest acceptable PSNR, in dB, against the unpatched pipeline's images.
        max_seconds: time after which no image is begun; the unpatched image of the first prompt and one other are
            always drawn.
        seed: for the noise of the first prompt; each further prompt adds 1.
        on_progress: called before each image with its setting, the number of images done, and the total.
        arguments: passed to the pipeline, such as `num_inference_steps`, `guidance_scale`, `height`, or `image`.

    Returns:
        a `Tuning`. Call `apply_patch(pipe, tuning.config)` and draw with
        `num_inference_steps=tuning.num_inference_steps`.

    Raises:
        ValueError: if there is no prompt or no step, or the pipeline cannot be patched.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not prompts:
        raise ValueError("prompts must be a prompt or several, got none")
    steps = arguments.pop("num_inference_steps", None)
    steps = _default_steps(pipe) if steps is None else steps
    check_count("num_inference_steps", steps, "a number of steps from 1 up")
    bench = Bench(pipe, arguments, seed, time.perf_counter() + max_seconds, on_progress or _ignore)
    with patched(pipe, ATCConfig.faster()):  # restores the present patch on leaving
        bench.warm_up(prompts[0])
        remove_patch(pipe)
        ways = [way for way in _ways(steps) if _fits(pipe, way)]
        return Tuning(bench.compare(prompts, ways, min_psnr).rows(), min_psnr)


def _ways(steps: int) -> Iterator[Way]:
    """The unpatched pipeline, then everything else that is tried, the most promising first."""
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


def _fits(pipe: Any, way: Way) -> bool:
    """Whether the pipeline's models support this way; models with rotary embeddings must keep all queries."""
    try:
        with patched(pipe, way.config) if way.config else nullcontext():
            return True
    except ValueError:
        return False


def _default_steps(pipe: Any) -> int:
    return int(inspect.signature(type(pipe).__call__).parameters["num_inference_steps"].default)


def _ignore(label: str, done: int, total: int) -> None: ...
