"""Steps that are forecast: exactly where outputs are a polynomial, never for another picture, gone when removed."""

import copy
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_module
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
    StableDiffusionPipeline,
)
from torch import Tensor

from atc_diffusion import ATCConfig, apply_patch, load_pipeline, remove_patch, summary
from tests.helpers.drawing import PARTS
from tests.helpers.ecosystem import enable_deep_cache, offload_groups, offload_sequentially
from tests.helpers.forecasting import FORECAST, SKIPPED, STEPS, Calls, Counted, draw, forecast_steps
from tests.helpers.loops import embedding, run, sample

CPU = torch.device("cpu")
FEW_MEMORIES = [lambda: DPMSolverMultistepScheduler(), lambda: DPMSolverMultistepScheduler(use_karras_sigmas=True)]
LONG_MEMORIES = [
    lambda: PNDMScheduler(skip_prk_steps=True),
    lambda: LMSDiscreteScheduler(),
    lambda: DEISMultistepScheduler(solver_order=3),
]
EMOJI = Path(__file__).parents[2] / "examples" / "emoji_diffusion"


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
    ],
)
def test_samplers_are_forecast_with_and_without_noise(scheduler, least):
    """The relative distance of the latents in dB; fewer steps give another image where noise is added."""
    pipe = emoji(scheduler)
    expected = draw_emoji(pipe)
    apply_patch(pipe, ATCConfig.forecast())
    assert fidelity(draw_emoji(pipe), expected) > least
    assert len(forecast_steps(pipe)) >= 3


@pytest.mark.slow
def test_the_noise_of_many_steps_allows_no_more_error_than_that_of_few():
    pipe = emoji(DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", use_karras_sigmas=True))
    penguin = partial(draw_emoji, pipe, "penguin", seed=1, num_inference_steps=50)
    expected = penguin()
    apply_patch(pipe, ATCConfig.forecast())
    assert fidelity(penguin(), expected) > 25
    assert len(forecast_steps(pipe)) >= 10


def emoji(scheduler: Any) -> Any:
    """The bundled model with another scheduler of its noise."""
    pipe = load_pipeline(str(EMOJI), torch.float32)
    pipe.scheduler = type(scheduler).from_config(
        dict(pipe.scheduler.config) | scheduler.config | {"prediction_type": "v_prediction"} | BETAS
    )
    return pipe


BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "rescale_betas_zero_snr": False}


def draw_emoji(pipe: Any, prompt: str = "red apple", seed: int = 0, **options: Any) -> Tensor:
    options = {"num_inference_steps": 20, "guidance_scale": 3.0} | options
    generator = torch.Generator().manual_seed(seed)
    return pipe(prompt, height=48, width=48, output_type="latent", generator=generator, **options).images


def fidelity(latents: Tensor, expected: Tensor) -> float:
    return float(-20 * torch.log10((latents - expected).norm() / expected.norm()))


@pytest.mark.slow
def test_errors_count_as_guidance_multiplies_them():
    pipe = emoji(DDIMScheduler())
    strong = partial(draw_emoji, pipe, "yellow star", seed=3, guidance_scale=7.5, num_inference_steps=20)
    expected = strong()
    apply_patch(pipe, ATCConfig.forecast())
    assert fidelity(strong(), expected) > 35


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


def test_steps_that_image_to_image_leaves_out_do_not_count(unet):
    apply_patch(unet, FORECAST)
    run(unet, torch.linspace(950, 0, STEPS)[9:], embedding(2))
    assert "fewer than 12 steps" in str(summary(unet))
    run(unet, torch.linspace(950, 0, STEPS)[8:], embedding(2))
    assert forecast_steps(unet)


@torch.no_grad()
def test_a_call_that_another_packages_hook_must_see_makes_all_calls_of_its_step(unet):
    """As in guidance that perturbs the network for one of its conditions."""

    def guided() -> Tensor:
        latents, attention = sample(), unet.mid_block.attentions[0].transformer_blocks[0].attn1
        for t in torch.linspace(1000, 50, STEPS):
            strong = unet(latents, t, embedding()).sample
            handle = attention.register_forward_hook(lambda module, args, output: 0 * output)
            weak = unet(latents, t, embedding()).sample
            handle.remove()
            latents = latents - 0.05 * (strong + 6 * (strong - weak))
        return latents

    expected = guided()
    apply_patch(unet, FORECAST)
    assert torch.equal(guided(), expected)
    assert "none of 20 steps forecast: another call of the same step had to be made" in str(summary(unet))


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


@torch.no_grad()
def test_steps_of_which_some_calls_are_forecast_are_counted_apart(unet):
    """One of two images is computed, because its text moves."""
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(STEPS)
    apply_patch(unet, FORECAST)
    images = [torch.randn(1, 4, 8, 8) for _ in range(2)]
    for step, t in enumerate(scheduler.timesteps):
        texts = torch.ones(1, 5, 12), torch.full((1, 5, 12), step / STEPS)
        images = [
            scheduler.step(unet(image, t, text).sample, t, image).prev_sample
            for image, text in zip(images, texts, strict=True)
        ]
    found = summary(unet).forecasts
    assert found is not None
    assert (found.forecast, found.in_part) == ((), SKIPPED)
    assert len(found.reasons) == STEPS
    assert str(found).startswith(f"{len(SKIPPED)} of {STEPS} steps forecast in part: 2, 4, 5")


@torch.no_grad()
def test_steps_that_are_done_again_are_those_of_one_run(unet):
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(STEPS)
    apply_patch(unet, FORECAST)
    for steps in (range(16), range(4, STEPS)):
        latents = torch.randn(1, 4, 8, 8)
        for t in scheduler.timesteps[steps.start : steps.stop]:
            latents = scheduler.step(unet(latents, t, embedding()).sample, t, latents).prev_sample
    found = summary(unet).forecasts
    assert found is not None
    assert found.steps == tuple(range(STEPS))
    assert {2, 4, 5} & set(found.forecast) == {2}
    assert set(found.in_part) >= {4, 5}


@torch.no_grad()
def test_images_of_a_batch_at_different_timesteps_are_computed(unet):
    """As of a server, where an image joins while another is drawn, and is alone at the end."""
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(STEPS)
    apply_patch(unet, FORECAST)
    late, images, texts = 10, list(torch.randn(2, 1, 4, 8, 8)), torch.randn(2, 5, 12)
    steps = [[i for i in range(2) if 0 <= step - late * i < STEPS] for step in range(STEPS + late)]
    for step, present in enumerate(steps):
        times = scheduler.timesteps[[step - late * i for i in present]]
        outputs = unet(torch.cat([images[i] for i in present]), times, texts[present]).sample
        for i, t, output in zip(present, times, outputs.split(1), strict=True):
            images[i] = scheduler.step(output, t, images[i]).prev_sample
    found = summary(unet).forecasts
    assert found is not None
    assert "the images of the batch are at different timesteps" in found.reasons
    assert min(found.forecast) >= STEPS - late


def test_timesteps_may_be_numbers(unet):
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(STEPS)
    apply_patch(unet, FORECAST)
    in_turn(unet, scheduler, (3,), [scheduler.timesteps.tolist()])
    assert forecast_steps(unet) == SKIPPED[:-1]  # 100, after 150, may be the last but one


@torch.no_grad()
def test_parts_of_guidance_in_turn_are_each_forecast(unet):
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
    calls = Calls()
    unet.conv_in = Counted(unet.conv_in, calls)
    in_turn = guided(batched=False)
    assert forecast_steps(unet) == SKIPPED
    assert len(calls) == 2 * (STEPS - len(SKIPPED))
    torch.testing.assert_close(in_turn, guided(batched=True), rtol=0, atol=1e-3)


def with_gradients(unet: Any, latents: Tensor, t: Tensor, text: Tensor) -> Tensor:
    with torch.enable_grad():
        return unet(latents.requires_grad_(True), t, text).sample.detach()


def with_a_number(unet: Any, latents: Tensor, t: Tensor, text: Tensor) -> Tensor:
    return unet(latents, int(t), text).sample


def in_another_thread(unet: Any, latents: Tensor, t: Tensor, text: Tensor) -> Tensor:
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(torch.no_grad()(unet), latents, t, text).result().sample


def by_another_network(unet: Any, latents: Tensor, t: Tensor, text: Tensor) -> Tensor:
    return unet.other(latents, t, text).sample


@torch.no_grad()
@pytest.mark.parametrize("other", [with_gradients, with_a_number, in_another_thread, by_another_network])
@pytest.mark.parametrize("comes_first", [False, True])
def test_parts_of_guidance_in_different_runs_are_computed(unet, other, comes_first):
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(STEPS)
    texts = torch.randn(2, 1, 5, 12)
    unet.__dict__["other"] = copy.deepcopy(unet)  # which is no submodule

    def guided() -> Tensor:
        latents = sample()
        for t in scheduler.timesteps.clone():
            calls = [other, lambda unet, *call: unet(*call).sample][:: 1 if comes_first else -1]
            parts = [call(unet, latents.clone(), t, text) for call, text in zip(calls, texts, strict=True)]
            latents = scheduler.step(parts[0] + 3 * (parts[1] - parts[0]), t, latents).prev_sample
        return latents

    expected = guided()
    apply_patch(unet, FORECAST)
    apply_patch(unet.other, FORECAST)
    assert torch.equal(guided(), expected)
    assert "none of" in str(summary(unet).forecasts)


@torch.no_grad()
def test_parts_of_guidance_in_turn_are_all_computed_where_one_is(unet):
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(STEPS)
    apply_patch(unet, forecast_tolerance=0.02, r=1.0)
    counts, latents = [], torch.randn(1, 4, 8, 8)
    weak, strong = torch.zeros(1, 5, 12), torch.randn(1, 5, 12) * 8
    calls = Calls()
    unet.conv_in = Counted(unet.conv_in, calls)
    for t in scheduler.timesteps:
        parts = [unet(latents, t, each).sample for each in (weak, strong)]
        counts.append(len(calls))
        calls.clear()
        latents = scheduler.step(parts[0] + 3 * (parts[1] - parts[0]), t, latents).prev_sample
    assert set(counts) <= {0, 2}
    assert counts.count(0) == len(forecast_steps(unet)) > 0


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


@pytest.mark.slow
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


def test_a_cache_that_replaces_the_forward_of_the_class_sees_every_step(components, monkeypatch):
    pipe = pipeline(components)
    kind, forward, calls = type(pipe.unet), type(pipe.unet).forward, Calls()

    def counting(self: Any, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, **options: Any) -> Any:
        calls.append(1)
        return forward(self, sample, timestep, encoder_hidden_states, **options)

    monkeypatch.setattr(kind, "forward", counting)
    apply_patch(pipe, FORECAST)
    draw(pipe)
    assert len(calls) == STEPS
    assert "none of 20 steps forecast: the network's forward was replaced" in str(summary(pipe))


def test_clusters_last_through_skipped_steps(components):
    config = ATCConfig(r=1.0, r_keys=0.5, recluster_threshold=1e9, forecast_tolerance=1e9)
    pipe = apply_patch(pipeline(components), config)
    draw(pipe)
    assert forecast_steps(pipe) == SKIPPED
    assert {layer.clusterings for layer in summary(pipe).layers} == {1}


@pytest.mark.slow
def test_compiled_blocks(components):
    pipe = apply_patch(pipeline(components), FORECAST)
    expected = draw(pipe)
    pipe.unet.mid_block.compile(backend="eager")
    torch.testing.assert_close(draw(pipe), expected, rtol=0, atol=1e-5)
    assert forecast_steps(pipe) == SKIPPED


@pytest.mark.slow
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
