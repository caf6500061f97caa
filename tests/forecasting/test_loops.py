"""What a loop does around its calls: images in turn or at once, parts of guidance, edits, steps done again."""

import copy
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from atc_diffusion import apply_patch, summary
from tests.helpers.forecasting import FORECAST, SKIPPED, STEPS, Calls, Counted, draw, forecast_steps, pipeline
from tests.helpers.loops import embedding, run, sample


@pytest.fixture
def scheduler() -> DDIMScheduler:
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(STEPS)
    return scheduler


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
    for result, image in zip(results, expected, strict=True):
        torch.testing.assert_close(result, image, rtol=0, atol=1e-5)


@torch.no_grad()
def in_turn(unet: Any, scheduler: Any, seeds: tuple[int, ...], timesteps: list[Any]) -> list[Tensor]:
    """Images of different prompts whose steps alternate, each along its own or the same timesteps."""
    latents = [torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    texts = [torch.randn(1, 5, 12, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    for step in range(STEPS):
        for i, entries in enumerate(timesteps):
            output = unet(latents[i], entries[step], texts[i], return_dict=False)[0]
            latents[i] = scheduler.step(output, entries[step], latents[i]).prev_sample
    return latents


@pytest.mark.parametrize("shared", [True, False])
def test_images_whose_steps_alternate_keep_their_own_forecasts(unet, shared, scheduler):
    apply_patch(unet, FORECAST)
    one, other = (in_turn(unet, scheduler, (seed,), [scheduler.timesteps.clone()])[0] for seed in (3, 4))
    first = scheduler.timesteps.clone()
    together = in_turn(unet, scheduler, (3, 4), [first, first if shared else first.clone()])
    assert torch.equal(together[0], one)
    assert torch.equal(together[1], other)
    assert forecast_steps(unet) == SKIPPED


@torch.no_grad()
def test_steps_of_which_some_calls_are_forecast_are_counted_apart(unet, scheduler):
    """One of two images is computed, because its text moves."""
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
def test_steps_that_are_done_again_are_those_of_one_run(unet, scheduler):
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
def test_images_of_a_batch_at_different_timesteps_are_computed(unet, scheduler):
    """As of a server, where an image joins while another is drawn, and is alone at the end."""
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


def test_timesteps_may_be_numbers(unet, scheduler):
    apply_patch(unet, FORECAST)
    in_turn(unet, scheduler, (3,), [scheduler.timesteps.tolist()])
    assert forecast_steps(unet) == SKIPPED[:-1]  # 100, after 150, may be the last but one


@torch.no_grad()
def test_parts_of_guidance_in_turn_are_each_forecast(unet, scheduler):
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
def test_parts_of_guidance_in_different_runs_are_computed(unet, other, comes_first, scheduler):
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
def test_parts_of_guidance_in_turn_are_all_computed_where_one_is(unet, scheduler):
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


def test_training_computes_every_step(unet):
    apply_patch(unet.requires_grad_(True), FORECAST)
    for timestep in torch.arange(STEPS).flip(0):
        unet(torch.randn(1, 4, 8, 8), timestep, torch.randn(1, 5, 12)).sample.sum().backward()
    assert not forecast_steps(unet)
