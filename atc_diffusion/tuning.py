"""Finds the fastest setting that keeps a pipeline's images: merging, forecasting, fewer steps, and combinations."""

import difflib
import inspect
import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from numbers import Integral
from statistics import fmean, median
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from atc_diffusion.commands import SEEDS
from atc_diffusion.config import MergeConfig
from atc_diffusion.fidelity import psnr
from atc_diffusion.methods import ATCConfig
from atc_diffusion.patch import patched, remove_patch, summary
from atc_diffusion.validation import check_count, check_not_negative

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from PIL.Image import Image

FASTER = 0.97  # of the unpatched time; anything nearer to 1 may be noise
DOUBT = 5.0  # dB that one image may be from the mean of several
FEWER_STEPS = (0.8, 0.5)  # fractions of the steps: what merging and forecasting compete with
OWN_ARGUMENTS = {
    "prompt": "give prompts",
    "generator": "give a seed",
    "output_type": "it compares PIL images",
    "return_dict": "it reads the images by name",
}

OnProgress = Callable[[str, int, int], None]
Case = tuple[str, int]  # a prompt and a seed
Draw = Callable[[Case, "Setting"], "Drawn"]


class Drawn(NamedTuple):
    """One call of the pipeline."""

    pixels: NDArray[np.uint8]  # [B, H, W, C]
    seconds: float
    computed: str  # why every step was computed, if some should have been forecast


@dataclass(frozen=True)
class Setting:
    """A way to draw images.

    Attributes:
        config: the patch; None: no patch.
        num_inference_steps: the number of steps that the pipeline is called with.
    """

    config: MergeConfig | None
    num_inference_steps: int

    def __str__(self) -> str:
        fractions = {name: getattr(self.config, name, None) for name in ("r", "r_keys")}
        merging = ", ".join(f"{name}={value}" for name, value in fractions.items() if value not in (1, None))
        steps = f"{self.num_inference_steps} step{'s' * (self.num_inference_steps != 1)}"
        return " + ".join(filter(None, [merging, "forecasting" * self.forecasts, steps]))

    @property
    def forecasts(self) -> bool:
        return self.config is not None and self.config.forecast_tolerance > 0


@dataclass(frozen=True)
class Row:
    """The measurements of a setting.

    Attributes:
        setting: the setting.
        seconds: median time of a call of the pipeline.
        ratio: median ratio of that time to the unpatched pipeline's for the same prompt.
        psnr: mean PSNR in dB against the unpatched pipeline's images; infinite if they are equal.
        num_prompts: number of prompts that were drawn.
        image: the image of the first prompt.
    """

    setting: Setting
    seconds: float
    ratio: float
    psnr: float
    num_prompts: int
    image: "Image | None" = None

    def __str__(self) -> str:
        return f"{self.setting!s:48} {self.seconds:8.2f} s  x {self.ratio:.2f}  {self.psnr:5.1f} dB"


@dataclass(frozen=True)
class Tuning:
    """The result of `tune`; prints as a table with advice.

    Attributes:
        rows: one for each setting that was tried, the fastest first.
        min_psnr: the lowest PSNR that was acceptable.
        note: why no step can be forecast, if none was.
    """

    rows: tuple[Row, ...]
    min_psnr: float
    note: str = ""

    @property
    def unpatched(self) -> Row:
        """The pipeline without a patch, at the number of steps that was asked for."""
        unpatched = (row for row in self.rows if row.setting.config is None)
        return max(unpatched, key=lambda row: row.setting.num_inference_steps)

    @property
    def best(self) -> Row:
        """The fastest setting that is close enough, or the unpatched pipeline if none is faster."""
        good = (row for row in self.rows if row.psnr >= self.min_psnr and row.ratio < FASTER)
        return next(good, self.unpatched)

    @property
    def pays(self) -> bool:
        """Whether a setting is faster than the unpatched pipeline and close enough."""
        return self.best is not self.unpatched

    @property
    def config(self) -> MergeConfig:
        """For `apply_patch`; where no patch pays, one that changes nothing."""
        return self.best.setting.config or ATCConfig(r=1.0)

    @property
    def num_inference_steps(self) -> int:
        """The number of steps to use together with `config`."""
        return self.best.setting.num_inference_steps

    @property
    def advice(self) -> str:
        """In words, then as code."""
        if self.pays:
            words = f"Fastest at {self.min_psnr:g} dB or more: {self.best.setting}, {self.best.ratio:.2f} of the time."
            patch = f"apply_patch(pipe, {self.config})\n" if self.best.setting.config else ""
            return f"{words}\n{patch}pipe(..., num_inference_steps={self.num_inference_steps})"
        if not (faster := [row for row in self.rows if row.ratio < FASTER]):
            return "Nothing pays here: no setting is faster than the unpatched pipeline."
        closest = max(faster, key=lambda row: row.psnr)
        words = f"Nothing pays here: no setting is faster at {self.min_psnr:g} dB or more."
        return f"{words} The closest of the faster ones: {closest.setting}, {closest.psnr:.1f} dB."

    def __str__(self) -> str:
        return "\n".join(filter(None, [*map(str, self.rows), self.note, self.advice]))


def tune(
    pipe: "DiffusionPipeline",
    prompts: str | Sequence[str],
    *,
    min_psnr: float = 40.0,
    max_seconds: float = math.inf,
    seed: int = 0,
    num_inference_steps: int | None = None,
    on_progress: OnProgress = lambda label, done, total: None,
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
        num_inference_steps: steps of the unpatched pipeline; None: its default.
        on_progress: called before each image with its setting, the number of images done, and the total.
        arguments: passed to the pipeline, such as `guidance_scale`, `height`, or `image`.

    Returns:
        A `Tuning`, whose `config` is for `apply_patch` and whose `num_inference_steps` is for the pipeline.

    Raises:
        ValueError: if there is no prompt or no step, an argument does not fit, or the pipeline cannot be patched.
    """
    prompts = _as_prompts(prompts)
    steps = _default_steps(pipe) if num_inference_steps is None else num_inference_steps
    _check(pipe, seed, steps, min_psnr, max_seconds, arguments)
    end, draw = time.perf_counter() + max_seconds, partial(_draw, pipe, arguments)
    cases = [(prompt, seed + number) for number, prompt in enumerate(prompts)]
    with patched(pipe, ATCConfig.faster()):  # restores the present patch on leaving
        on_progress("warming up", 0, 0)  # compiles everything
        draw(cases[0], Setting(ATCConfig.faster(), 2))
        remove_patch(pipe)
        draw(cases[0], Setting(None, 2))
        settings = [setting for setting in _settings(steps) if _fits(pipe, setting)]
        return _compare(draw, settings, cases, min_psnr, end, on_progress)


def _settings(steps: int) -> Iterator[Setting]:
    """The unpatched pipeline, then everything else that is tried, the most promising first."""
    yield Setting(None, steps)
    fast, faster = ATCConfig.fast, ATCConfig.faster
    for config in (faster(), fast(), ATCConfig.forecast(), faster(r=0.5), fast(0.25)):
        yield Setting(config, steps)
    for fewer in dict.fromkeys(max(1, round(fraction * steps)) for fraction in FEWER_STEPS):
        if fewer < steps:
            yield from (Setting(config, fewer) for config in (None, fast()))


def _compare(
    draw: Draw, settings: Sequence[Setting], cases: Sequence[Case], min_psnr: float, end: float, on_progress: OnProgress
) -> Tuning:
    """Draw with every setting, of which the first is the unpatched pipeline, as long as it may turn out best."""
    (unpatched, *others), note, done = settings, "", 0
    draws: dict[Setting, list[Drawn]] = {}
    for number, case in enumerate(cases):
        total = done + (1 + len(others)) * (len(cases) - number)
        for setting in (unpatched, *others):
            if len(draws) > 1 and time.perf_counter() > end:
                return Tuning(_rows(draws), min_psnr, note)
            on_progress(str(setting), done, total)
            done += 1
            if note and setting.forecasts:  # what keeps one setting from forecasting keeps all
                continue
            drawn = _checked(draw(case, setting)) if setting == unpatched else _attempt(draw, case, setting)
            if number == 0 and drawn and drawn.computed:
                note = f"Forecasting: {drawn.computed}."
            elif drawn:
                draws.setdefault(setting, []).append(drawn)
        rows = [row for row in _rows(draws) if row.num_prompts == number + 1]  # others failed
        promising = {row.setting for row in rows if row.ratio < 1 and row.psnr >= min_psnr - DOUBT}
        others = [setting for setting in others if setting in promising]
    return Tuning(_rows(draws), min_psnr, note)


def _rows(draws: dict[Setting, list[Drawn]]) -> tuple[Row, ...]:
    """The fastest first. The first setting is the unpatched pipeline; each was drawn for the first prompts, or all."""
    from PIL import Image

    rows, unpatched = [], next(iter(draws.values()))
    for setting, drawn in draws.items():
        pairs = list(zip(drawn, unpatched, strict=False))
        ratio = median(one.seconds / other.seconds for one, other in pairs)
        nearness = fmean(psnr(one.pixels, other.pixels) for one, other in pairs)
        image, seconds = Image.fromarray(drawn[0].pixels[0]), median(one.seconds for one in drawn)
        rows.append(Row(setting, seconds, ratio, nearness, len(drawn), image))
    return tuple(sorted(rows, key=lambda row: row.ratio))


def _attempt(draw: Draw, case: Case, setting: Setting) -> Drawn | None:
    """None, with a warning, if this setting fails on this model or device."""
    try:
        return draw(case, setting)
    except Exception as error:  # whatever a driver, a model or a missing operation raises
        warnings.warn(f"left out {setting}, which fails here: {error}", stacklevel=4)
        return None


def _checked(unpatched: Drawn) -> Drawn:
    """What the pipeline draws, which is empty where numbers overflow, as those of some VAEs do in float16."""
    if unpatched.pixels.min() == unpatched.pixels.max():
        raise ValueError(
            "the unpatched pipeline draws an empty image, with which none can be compared; try other arguments, or"
            " dtype float32"
        )
    return unpatched


def _draw(pipe: Any, arguments: dict[str, Any], case: Case, setting: Setting) -> Drawn:
    (prompt, seed), steps = case, setting.num_inference_steps
    generator = torch.Generator().manual_seed(seed)
    with patched(pipe, setting.config) if setting.config else nullcontext():
        start = time.perf_counter()
        images = pipe(prompt=prompt, generator=generator, num_inference_steps=steps, **arguments).images
        seconds = time.perf_counter() - start
        forecasts = summary(pipe).forecasts if setting.forecasts else None
    computed = str(forecasts) if forecasts and not forecasts.forecast else ""
    return Drawn(np.stack([np.asarray(image) for image in images]), seconds, computed)


def _fits(pipe: Any, setting: Setting) -> bool:
    """Whether the pipeline's models support this setting; models with rotary embeddings must keep all queries."""
    try:
        with patched(pipe, setting.config) if setting.config else nullcontext():
            return True
    except ValueError:
        return False


def _default_steps(pipe: object) -> Any:
    parameters = inspect.signature(type(pipe).__call__).parameters
    if "num_inference_steps" not in parameters:
        raise ValueError(f"tune needs a diffusers pipeline that takes num_inference_steps, got {type(pipe).__name__}")
    return parameters["num_inference_steps"].default


def _as_prompts(prompts: object) -> list[str]:
    given = [prompts] if isinstance(prompts, str) else list(prompts) if isinstance(prompts, Iterable) else []
    if not given or not all(isinstance(each, str) for each in given):
        raise ValueError(f"prompts must be a prompt or several, got {prompts!r}")
    return given


def _check(pipe: Any, seed: object, steps: object, min_psnr: object, max_seconds: object, arguments: Any) -> None:
    if not isinstance(seed, Integral) or int(seed) not in SEEDS:
        raise ValueError(f"seed must be a whole number of at most 64 bits, got {seed!r}")
    check_count("num_inference_steps", steps, "a number of steps from 1 up")
    check_not_negative("min_psnr", min_psnr)
    check_not_negative("max_seconds", max_seconds)
    for name in OWN_ARGUMENTS.keys() & arguments.keys():
        raise ValueError(f"tune sets {name} itself; {OWN_ARGUMENTS[name]}")
    known = inspect.signature(type(pipe).__call__).parameters
    for name in arguments.keys() - known.keys():
        if close := difflib.get_close_matches(name, known, n=1):
            raise ValueError(f"{type(pipe).__name__} has no argument {name!r}; did you mean {close[0]!r}?")
