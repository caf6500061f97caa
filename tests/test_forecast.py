"""Steps that are forecast: exactly where outputs are a polynomial, never for another picture, gone when removed."""

import copy
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_module
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UniPCMultistepScheduler,
)
from torch import Tensor

from atc_diffusion import ATCConfig, apply_patch, remove_patch, summary
from atc_diffusion.extrapolation import lagrange
from atc_diffusion.forecast import Forecasts, Picture
from atc_diffusion.inputs import Inputs
from atc_diffusion.moment import Step
from tests.helpers.drawing import PARTS
from tests.helpers.ecosystem import enable_deep_cache, offload_groups, offload_sequentially
from tests.helpers.forecasting import FORECAST, SKIPPED, STEPS, draw, forecast_steps

CPU = torch.device("cpu")
STOCHASTIC = [
    lambda: EulerAncestralDiscreteScheduler(),
    lambda: DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"),
]
DETERMINISTIC = [
    lambda: EulerDiscreteScheduler(),
    lambda: EulerDiscreteScheduler(use_karras_sigmas=True),
    lambda: DPMSolverMultistepScheduler(),
    lambda: UniPCMultistepScheduler(),
    lambda: PNDMScheduler(skip_prk_steps=True),
]


def pipeline(components: dict[str, Any], scheduler: Any = None) -> Any:
    parts = components | ({"scheduler": scheduler} if scheduler else {})
    return StableDiffusionPipeline(**parts, **PARTS)


def test_nothing_changes_without_a_tolerance(components):
    pipe = pipeline(components)
    expected = draw(pipe)
    apply_patch(pipe, r=1.0)
    assert torch.equal(draw(pipe), expected)
    assert "forward" not in vars(pipe.unet)
    assert summary(pipe).forecasts is None


def test_the_weights_reproduce_polynomials():
    weights = lagrange([0, 1, 4], 6)
    for power in range(3):
        assert sum(w * step**power for w, step in zip(weights, [0, 1, 4], strict=True)) == pytest.approx(6**power)


def polynomial_run(tolerance: float) -> tuple[dict[int, float], Tensor, Tensor]:
    """Relative errors, by step, of the forecasts of a quadratic, and the final latents with and without forecasting."""
    constant, linear, quadratic = torch.randn(3, 2, 4, 8, 8)
    forecasts = Forecasts(0, tolerance)
    latents = expected = torch.randn(2, 4, 8, 8)
    errors = {}
    for step in range(STEPS):
        output = constant + linear * step / STEPS + quadratic * (step / STEPS) ** 2
        visit = forecasts.visit(Inputs((latents,)), Step(step, step == STEPS - 1, 1 / STEPS))
        if visit.output is not None:
            errors[step] = float((visit.output[0] - output).norm() / output.norm())
        returned = visit.output or (output,)
        visit.end(returned)
        latents = 0.95 * latents + 0.05 * returned[0]
        expected = 0.95 * expected + 0.05 * output
    return errors, latents, expected


@torch.no_grad()
def test_a_polynomial_is_forecast_exactly():
    errors, latents, expected = polynomial_run(tolerance=0.1)
    quadratic = [error for step, error in errors.items() if step > 4]  # the first have two outputs, which make a line
    assert len(quadratic) >= 3
    assert max(quadratic) < 1e-4
    torch.testing.assert_close(latents, expected, rtol=0, atol=5e-3)


@torch.no_grad()
def test_nothing_is_forecast_beyond_the_tolerance():
    errors, latents, expected = polynomial_run(tolerance=1e-12)
    assert not errors
    assert torch.equal(latents, expected)


@pytest.mark.parametrize(
    ("lengths", "growth"), [((0.1, 0.15), 1.5), ((0.1, 0.9), 2), ((0.1, 0.11), 1), ((0.1, 0.05), 1), ((0.0, 0.1), 1)]
)
def test_steps_are_expected_to_grow_as_they_did(lengths, growth):
    picture = Picture(2, torch.ones(1, 4, 8, 8), lengths=lengths)
    assert picture.growth() == pytest.approx(growth)
    assert picture.next_length() == pytest.approx(max(lengths) * growth)


@pytest.mark.parametrize("scheduler", DETERMINISTIC)
def test_deterministic_samplers_skip_one_step_and_then_two_of_three(components, scheduler):
    pipe = pipeline(components, scheduler())
    calls = []
    pipe.unet.conv_in.register_forward_hook(lambda *_: calls.append(1))
    apply_patch(pipe, FORECAST)
    draw(pipe, batch=2)
    entries = len(pipe.scheduler.timesteps)
    assert forecast_steps(pipe) == (2, *(step for step in range(4, entries - 1) if step % 3))
    assert len(calls) == entries - len(forecast_steps(pipe))
    assert f"{len(forecast_steps(pipe))} of {entries} steps forecast: 2, 4, 5" in str(summary(pipe))


@pytest.mark.parametrize("scheduler", STOCHASTIC)
def test_stochastic_samplers_get_the_unforecast_picture(components, scheduler):
    expected = draw(pipeline(components, scheduler()))
    pipe = apply_patch(pipeline(components, scheduler()), FORECAST)
    assert torch.equal(draw(pipe), expected)
    assert "none of 20 steps forecast: latents did not follow from the outputs" in str(summary(pipe))


@pytest.mark.parametrize(
    ("scheduler", "steps", "reason"),
    [
        (HeunDiscreteScheduler(), STEPS, "repeats its timesteps"),
        (DDIMScheduler(clip_sample=False), 19, "fewer than 20 steps"),
    ],
)
def test_second_order_and_short_runs_are_computed(components, scheduler, steps, reason):
    pipe = pipeline(components, scheduler)
    expected = draw(pipe, steps=steps)
    apply_patch(pipe, FORECAST)
    assert torch.equal(draw(pipe, steps=steps), expected)
    assert reason in str(summary(pipe))


def test_latents_that_a_callback_changes_are_computed(components):
    def edit(pipe: Any, step: int, timestep: Any, values: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"latents": values["latents"].roll(1, -1) if step == 5 else values["latents"]}

    pipe = apply_patch(pipeline(components), FORECAST)
    draw(pipe, callback_on_step_end=edit)
    assert forecast_steps(pipe) == (2, 4, 5, 8, 10, 11, 13, 14, 16, 17)


def test_a_prompt_that_changes_is_computed(components):
    def change(pipe: Any, step: int, timestep: Any, values: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"prompt_embeds": values["prompt_embeds"] + (step == 5)}

    pipe = apply_patch(pipeline(components), FORECAST)
    draw(pipe, callback_on_step_end=change, callback_on_step_end_tensor_inputs=["prompt_embeds"])
    assert forecast_steps(pipe) == (2, 4, 5, 8, 10, 11, 13, 14, 16, 17)


def test_two_threads_share_a_network(components):
    pipe = apply_patch(pipeline(components), FORECAST)
    expected = [draw(pipe, seed) for seed in (0, 1)]
    other = apply_patch(pipeline(components | {"scheduler": copy.deepcopy(pipe.scheduler)}), FORECAST)
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(draw, (pipe, other), (0, 1)))
    for result, picture in zip(results, expected, strict=True):
        torch.testing.assert_close(result, picture, rtol=0, atol=1e-5)


@torch.no_grad()
def in_turn(unet: Any, scheduler: Any, seeds: tuple[int, ...], timesteps: list[Any]) -> list[Tensor]:
    """Pictures of different prompts whose steps alternate, each along its own or the same timesteps."""
    latents = [torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    texts = [torch.randn(1, 5, 12, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    for step in range(STEPS):
        for i, entries in enumerate(timesteps):
            output = unet(latents[i], entries[step], texts[i], return_dict=False)[0]
            latents[i] = scheduler.step(output, entries[step], latents[i]).prev_sample
    return latents


@pytest.mark.parametrize("shared", [True, False])
def test_pictures_whose_steps_alternate_keep_their_own_forecasts(unet, shared):
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(STEPS)
    apply_patch(unet, FORECAST)
    one, other = (in_turn(unet, scheduler, (seed,), [scheduler.timesteps.clone()])[0] for seed in (3, 4))
    first = scheduler.timesteps.clone()
    together = in_turn(unet, scheduler, (3, 4), [first, first if shared else first.clone()])
    assert torch.equal(together[0], one)
    assert torch.equal(together[1], other)
    assert forecast_steps(unet) == SKIPPED


def test_timesteps_may_be_numbers(unet):
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(STEPS)
    apply_patch(unet, FORECAST)
    in_turn(unet, scheduler, (3,), [scheduler.timesteps.tolist()])
    assert forecast_steps(unet) == SKIPPED[:-1]  # 100, after 150, may be the last but one


@torch.no_grad()
def test_parts_of_guidance_in_turn_are_forecast_each_by_its_own(unet):
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(STEPS)
    texts = torch.randn(2, 1, 5, 12)
    start = torch.randn(1, 4, 8, 8)

    def guided(batched: bool) -> Tensor:
        latents = start
        for t in scheduler.timesteps.clone():
            if batched:
                parts = unet(latents.repeat(2, 1, 1, 1), t, texts.flatten(0, 1)).sample.chunk(2)
            else:
                parts = [unet(latents, t, each).sample for each in texts]
            latents = scheduler.step(parts[0] + 3 * (parts[1] - parts[0]), t, latents).prev_sample
        return latents

    apply_patch(unet, FORECAST)
    in_turn = guided(batched=False)
    assert forecast_steps(unet) == SKIPPED
    torch.testing.assert_close(in_turn, guided(batched=True), rtol=0, atol=1e-3)


def test_a_deep_copy_is_independent(components):
    pipe = apply_patch(pipeline(components), FORECAST)
    expected = draw(pipe)
    twin = pipeline(components | {"unet": copy.deepcopy(pipe.unet)})
    assert torch.equal(draw(twin), expected)
    assert forecast_steps(twin) == SKIPPED
    twin.unet.conv_out.weight.data.zero_()
    assert torch.equal(draw(pipe), expected)
    remove_patch(pipe)
    assert "forward" not in vars(pipe.unet)
    draw(twin)
    assert forecast_steps(twin) == SKIPPED


def test_removal_is_exact(components):
    pipe = pipeline(components)
    before, attributes = draw(pipe), set(vars(pipe.unet))
    apply_patch(apply_patch(pipe, FORECAST), FORECAST)
    assert not torch.equal(draw(pipe), before)
    remove_patch(pipe)
    assert torch.equal(draw(pipe), before)
    assert set(vars(pipe.unet)) == attributes


def test_an_interrupted_run_leaves_nothing(components):
    def interrupt(pipe: Any, step: int, timestep: Any, values: dict[str, Tensor]) -> dict[str, Tensor]:
        if step == 5:
            raise KeyboardInterrupt
        return {}

    pipe = apply_patch(pipeline(components), FORECAST)
    expected = draw(pipe)
    with pytest.raises(KeyboardInterrupt):
        draw(pipe, callback_on_step_end=interrupt)
    assert torch.equal(draw(pipe), expected)


def test_offloading_before_and_after(components):
    unforecast = draw(pipeline(components))
    expected = draw(apply_patch(pipeline(components), FORECAST))
    pipe = remove_patch(pipeline(components))
    offload_sequentially(pipe)
    assert torch.equal(draw(apply_patch(pipe, FORECAST)), expected)
    remove_patch(pipe)
    remove_hook_from_module(pipe.unet, recurse=True)
    apply_patch(pipe, FORECAST)
    cpu_offload(pipe.unet, CPU)
    assert torch.equal(draw(pipe), expected)
    assert forecast_steps(pipe) == SKIPPED
    remove_patch(pipe)
    remove_hook_from_module(pipe.unet, recurse=True)
    assert torch.equal(draw(pipe), unforecast)


def test_group_offloading(components):
    expected = draw(apply_patch(pipeline(components), FORECAST))
    pipe = apply_patch(pipeline(components), FORECAST)
    offload_groups(pipe)
    assert torch.equal(draw(pipe), expected)
    assert forecast_steps(pipe) == SKIPPED


@pytest.mark.parametrize("cache_first", [True, False])
def test_a_cache_that_counts_steps_sees_them_all(components, cache_first):
    pipe = pipeline(components)
    steps = [enable_deep_cache, lambda pipe: apply_patch(pipe, FORECAST)]
    for step in steps if cache_first else reversed(steps):
        step(pipe)
    draw(pipe)
    assert "none of 20 steps forecast: the network's forward was replaced" in str(summary(pipe))


def test_clusters_last_through_skipped_steps(components):
    config = ATCConfig(r=1.0, r_keys=0.5, recluster_threshold=1e9, forecast_tolerance=1e9)
    pipe = apply_patch(pipeline(components), config)
    draw(pipe)
    assert forecast_steps(pipe) == SKIPPED
    assert {layer.clusterings for layer in summary(pipe).layers} == {1}


def test_compiled_blocks(components):
    pipe = apply_patch(pipeline(components), FORECAST)
    expected = draw(pipe)
    pipe.unet.mid_block.compile(backend="eager")
    torch.testing.assert_close(draw(pipe), expected, rtol=0, atol=1e-5)
    assert forecast_steps(pipe) == SKIPPED


def test_a_compiled_network(components):
    pipe = apply_patch(pipeline(components), FORECAST)
    expected = draw(pipe)
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    torch.testing.assert_close(draw(pipe), expected, rtol=0, atol=1e-5)
    assert forecast_steps(pipe) == SKIPPED


def test_training_computes_every_step(unet):
    apply_patch(unet.requires_grad_(True), FORECAST)
    for timestep in torch.arange(STEPS).flip(0):
        unet(torch.randn(1, 4, 8, 8), timestep, torch.randn(1, 5, 12)).sample.sum().backward()
    assert not forecast_steps(unet)


@pytest.mark.parametrize("tolerance", [-1, True, "0.1", float("nan")])
def test_a_tolerance_is_a_number(tolerance):
    with pytest.raises(ValueError, match="forecast_tolerance must be a number from 0 up, got"):
        ATCConfig(forecast_tolerance=tolerance)
