"""Which samplers are forecast, and how close the images stay."""

from functools import partial
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from atc_diffusion import ATCConfig, apply_patch, load_pipeline, summary
from tests.helpers.forecasting import (
    FORECAST,
    SKIPPED,
    STEPS,
    Calls,
    Counted,
    draw,
    draw_emoji,
    emoji,
    fidelity,
    forecast_fidelity,
    forecast_steps,
    pipeline,
)
from tests.helpers.tiny_pipelines import EMOJI

FEW_MEMORIES = [lambda: DPMSolverMultistepScheduler(), lambda: DPMSolverMultistepScheduler(use_karras_sigmas=True)]
LONG_MEMORIES = [
    lambda: PNDMScheduler(skip_prk_steps=True),
    lambda: LMSDiscreteScheduler(),
    lambda: DEISMultistepScheduler(solver_order=3),
]


@pytest.mark.parametrize("karras", [False, True])
def test_one_step_is_skipped_and_then_two_of_three(components, karras):
    pipe = apply_patch(pipeline(components, EulerDiscreteScheduler(use_karras_sigmas=karras)), FORECAST)
    calls = Calls()
    pipe.unet.conv_in = Counted(pipe.unet.conv_in, calls)
    draw(pipe, batch=2)
    assert forecast_steps(pipe) == SKIPPED
    assert len(calls) == STEPS - len(SKIPPED)
    assert f"{len(SKIPPED)} of {STEPS} steps forecast: 2, 4, 5" in str(summary(pipe))


@pytest.mark.parametrize("scheduler", FEW_MEMORIES)
def test_a_solver_that_remembers_one_step_is_forecast_once_that_is_known(components, scheduler):
    pipe = apply_patch(pipeline(components, scheduler()), FORECAST)
    draw(pipe)
    assert len(forecast_steps(pipe)) >= 2


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", LONG_MEMORIES)
def test_solvers_that_magnify_errors_are_computed(scheduler):
    """They weigh errors that come and go up to seven times as much as others."""
    pipe = emoji(scheduler())
    expected = draw_emoji(pipe)
    apply_patch(pipe.unet, ATCConfig.forecast())  # which knows no scheduler
    assert fidelity(draw_emoji(pipe), expected) > 40
    reasons = getattr(summary(pipe).forecasts, "reasons", ())
    assert "the latents follow from several earlier steps, which would magnify errors" in reasons


@pytest.mark.parametrize("scheduler", LONG_MEMORIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pipelines_with_such_a_solver_are_computed(components, scheduler, dtype):
    """In half precision, its memory may hide in the rounding."""
    pipe = apply_patch(pipeline(components, scheduler()), FORECAST)
    pipe.unet.to(dtype)
    draw(pipe)
    assert "none of" in str(summary(pipe).forecasts)
    assert "the sampler weighs several earlier steps" in str(summary(pipe).forecasts)


@pytest.mark.parametrize(
    ("scheduler", "least"),
    [
        (EulerAncestralDiscreteScheduler(), 20),
        (DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"), 20),
        (DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", use_karras_sigmas=True), 20),
        (DDIMScheduler(clip_sample=False), 30),
        (EulerDiscreteScheduler(), 30),
        (UniPCMultistepScheduler(), 35),
    ],
)
def test_samplers_are_forecast_with_and_without_noise(scheduler, least):
    """The relative distance of the latents in dB; fewer steps give another image where noise is added."""
    pipe = emoji(scheduler)
    assert forecast_fidelity(pipe, partial(draw_emoji, pipe)) > least
    assert len(forecast_steps(pipe)) >= 3


@pytest.mark.slow
def test_a_step_that_is_forecast_does_not_hide_how_far_a_solver_remembers():
    """A forecast follows from the images before it, and so the memory of the latents can be told in many ways."""
    pipe = load_pipeline(str(EMOJI), torch.float32)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, rescale_betas_zero_snr=False)
    apple = partial(draw_emoji, pipe, height=64, width=64, num_inference_steps=30)
    assert forecast_fidelity(pipe, apple) > 35
    assert len(forecast_steps(pipe)) >= 10


@pytest.mark.slow
def test_the_noise_of_many_steps_allows_no_more_error_than_that_of_few():
    pipe = emoji(DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", use_karras_sigmas=True))
    penguin = partial(draw_emoji, pipe, "penguin", seed=1, num_inference_steps=50)
    assert forecast_fidelity(pipe, penguin) > 25
    assert len(forecast_steps(pipe)) >= 10


@pytest.mark.slow
def test_errors_count_as_guidance_multiplies_them():
    pipe = emoji(DDIMScheduler())
    strong = partial(draw_emoji, pipe, "yellow star", seed=3, guidance_scale=7.5, num_inference_steps=20)
    assert forecast_fidelity(pipe, strong) > 35


def replace_half(pipe: Any, step: int, t: Tensor, tensors: Any) -> Any:
    latents = tensors["latents"].clone()
    if step in (5, 11, 15):
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(step))
        latents[..., :6] = (0.7 * latents + 0.7 * latents.std() * noise)[..., 6:].flip(3)
    return {"latents": latents}


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", [DDIMScheduler(clip_sample=False), EulerAncestralDiscreteScheduler()])
def test_every_edit_of_the_latents_is_computed_also_where_a_sampler_adds_noise(scheduler):
    pipe = emoji(scheduler)
    pipe.set_progress_bar_config(disable=True)
    apply_patch(pipe, ATCConfig.forecast())
    draw_emoji(pipe, num_inference_steps=20, callback_on_step_end=replace_half)
    assert forecast_steps(pipe)
    assert not {6, 12, 16} & set(forecast_steps(pipe))


@pytest.mark.parametrize(
    ("scheduler", "steps", "reason"),
    [
        (HeunDiscreteScheduler(), STEPS, "repeats its timesteps"),
        (KDPM2AncestralDiscreteScheduler(), STEPS, "repeats its timesteps"),  # but for rounding
        (EDMEulerScheduler(), STEPS, "not on a scale from 1000 to 0"),  # but on that of the logarithm of the noise
        (DDIMScheduler(clip_sample=False), 11, "fewer than 12 steps"),
    ],
)
def test_second_order_and_short_runs_are_computed(components, scheduler, steps, reason):
    pipe = pipeline(components, scheduler)
    expected = draw(pipe, steps=steps)
    apply_patch(pipe, FORECAST)
    assert torch.equal(draw(pipe, steps=steps), expected)
    assert reason in str(summary(pipe))
