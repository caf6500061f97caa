"""Which groupings serve again: counted, and compared with grouping anew."""

import copy
import io
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, HeunDiscreteScheduler, PNDMScheduler, StableDiffusionImg2ImgPipeline
from diffusers import StableDiffusionPipeline as Pipeline
from torch import Tensor

from atc_diffusion import ATCConfig, apply_patch, remove_patch, summary
from atc_diffusion.run import _goes_back, _moment, _progress
from tests.test_pipelines import PARTS, draw, text

LAYERS = 3


def counts(model: Any) -> list[int]:
    return [layer.clusterings for layer in summary(model).layers]


def embedding(items: int = 1) -> Tensor:
    return torch.randn(items, 5, 12, generator=torch.Generator().manual_seed(1))


def sample(items: int = 1, size: int = 8) -> Tensor:
    return torch.randn(items, 4, size, 8, generator=torch.Generator().manual_seed(items))


@torch.no_grad()
def run(unet: Any, timesteps: list[int], text: Tensor, latents: Tensor | None = None) -> Tensor:
    """A denoising loop; returns its last output."""
    latents = sample(len(text)) if latents is None else latents
    for timestep in timesteps:
        latents = unet(latents, timestep, text).sample
    return latents


@pytest.mark.parametrize(("refresh_every", "expected"), [(1, 6), (2, 3), (3, 2), (4, 2), (10, 1)])
def test_a_grouping_serves_so_many_steps(unet, refresh_every, expected):
    apply_patch(unet, refresh_every=refresh_every)
    run(unet, [900, 700, 500, 300, 100, 0], embedding())
    assert counts(unet) == [expected] * LAYERS


def test_a_new_run_starts_afresh_also_with_the_same_prompt(unet):
    apply_patch(unet, refresh_every=10)
    prompt = embedding()
    first = run(unet, [900, 500], prompt)
    run(unet, [900, 500, 100], prompt, sample() + 1)
    assert torch.equal(run(unet, [900, 500], prompt), first)
    assert counts(unet) == [1] * LAYERS
    run(unet, [900], prompt)
    assert torch.equal(run(unet, [900], prompt), run(apply_patch(unet), [900], prompt))


@pytest.mark.parametrize("change", ["shape", "batch", "dtype", "prompt", "exception"])
def test_what_changes_starts_afresh(unet, change):
    apply_patch(unet, refresh_every=10)
    prompt = embedding()
    run(unet, [900], prompt)
    second, latents = prompt, sample()
    if change == "shape":
        latents = sample(size=12)
    elif change == "batch":
        second, latents = embedding(2), sample(2)
    elif change == "dtype":
        unet, second, latents = unet.double(), prompt.double(), latents.double()
    elif change == "prompt":
        second = embedding() + 1
    else:
        handle = unet.mid_block.register_forward_pre_hook(lambda module, args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(unet, [800], prompt)
        handle.remove()
    reused = run(unet, [700], second, latents)
    assert torch.equal(reused, run(apply_patch(unet), [700], second, latents))


def test_two_models_never_share(unet):
    apply_patch(unet, refresh_every=10)
    prompt = embedding()
    run(unet, [900], prompt)
    clone = copy.deepcopy(unet)
    other = sample() + 1
    expected = run(apply_patch(copy.deepcopy(unet)), [700], prompt, other)
    assert torch.equal(run(clone, [700], prompt, other), expected)
    assert not torch.equal(run(unet, [700], prompt, other), expected)


def test_a_patched_model_can_be_pickled_within_a_run(unet):
    apply_patch(unet, refresh_every=10)
    prompt = embedding()
    run(unet, [900], prompt)
    buffer = io.BytesIO()
    torch.save(unet, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert torch.equal(run(loaded, [700], prompt), run(apply_patch(unet), [700], prompt))


def test_guidance_halves_called_in_turn_keep_their_own_groupings(unet):
    apply_patch(unet, refresh_every=10)
    halves = embedding(), embedding() + 1
    outputs = [run(unet, [t], half, sample() + t / 1000) for t in (900, 700) for half in halves]
    assert counts(unet) == [2] * LAYERS
    for half, before in zip(halves, outputs[:2], strict=True):
        apply_patch(unet, refresh_every=10)
        alone = [run(unet, [t], half, sample() + t / 1000) for t in (900, 700)]
        assert torch.equal(alone[0], before)
        assert any(torch.equal(alone[1], output) for output in outputs[2:])


def test_layers_of_a_level_share(unet):
    apply_patch(unet, share_layers=True, max_downsample=2, refresh_every=1)
    run(unet, [900, 500], embedding())
    layers = summary(unet).layers
    assert {level: sum(x.clusterings for x in layers if x.downsample == level) for level in (1, 2)} == {1: 2, 2: 2}


@pytest.mark.parametrize(("parts", "pictures"), [(2, 1), (2, 3), (3, 1), (3, 2)])
def test_guidance_parts_share_from_the_second_step(unet, parts, pictures):
    """Also where all pictures begin with the same latents."""
    prompt = embedding(parts * pictures)
    latents = sample().repeat(parts * pictures, 1, 1, 1)
    apply_patch(unet, share_guidance=True)
    exact = run(unet, [900], prompt, latents)
    assert torch.equal(exact, run(apply_patch(unet), [900], prompt, latents))
    apply_patch(unet, share_guidance=True)
    run(unet, [900], prompt, latents)
    for timestep in (700, 500):
        run(unet, [timestep], prompt, sample(pictures).repeat(parts, 1, 1, 1))
        assert unet._atc_diffusion.run._prompts[0].guidance_parts == parts


def test_shared_groupings_are_those_of_the_last_part(unet):
    prompt, latents = 30 * embedding(2), sample().repeat(2, 1, 1, 1)
    runs = []
    for share in (True, False):
        apply_patch(unet, share_guidance=share, refresh_every=1)
        runs.append([run(unet, [timestep], prompt, latents + timestep / 1000) for timestep in (900, 700)])
    shared, exact = runs
    assert torch.equal(shared[0], exact[0])
    assert torch.allclose(shared[1][1], exact[1][1], atol=1e-5)
    assert not torch.allclose(shared[1][0], exact[1][0], atol=1e-5)


@pytest.mark.parametrize("seeds", [[1, 1], [1, 2]])
def test_prompts_without_guidance_never_share(unet, seeds):
    """Two prompts of one seed have equal latents at the first step, and part there."""
    prompt = embedding(2)
    latents = torch.cat([sample() * seed for seed in seeds])
    apply_patch(unet, share_guidance=True, refresh_every=1)
    shared = run(unet, [900, 700, 500], prompt, latents)
    apply_patch(unet, share_guidance=False, refresh_every=1)
    assert torch.equal(shared, run(unet, [900, 700, 500], prompt, latents))


def test_a_position_in_the_schedule_is_known_without_waiting_for_its_device():
    """Meta tensors have no values that could be read."""
    schedule = torch.arange(10, 0, -1, device="meta")
    moments = [moment for timestep in schedule if (moment := _moment(timestep)) is not None]
    assert len(moments) == 10
    assert not any(_goes_back(a, b) for a, b in itertools.pairwise(moments))
    assert _goes_back(moments[3], moments[0])
    assert _moment(torch.empty((), device="meta")) is None
    assert _moment(torch.empty(2, device="meta")) is None


@pytest.mark.parametrize(
    ("timestep", "expected"),
    [(999, 0.001), (torch.tensor(250), 0.75), (0.0, 1.0), (2000, 0.0), (torch.empty((), device="meta"), None)],
)
def test_progress_without_a_schedule_is_by_the_timestep(timestep, expected):
    assert _progress(timestep) == pytest.approx(expected)


def test_progress_is_the_place_in_the_schedule():
    for device in ("cpu", "meta"):
        schedule = torch.tensor([999, 400, 399, 1], device=device)
        assert [_progress(timestep) for timestep in schedule] == pytest.approx([0, 1 / 3, 2 / 3, 1])


def test_the_share_follows_level_and_progress(unet):
    apply_patch(unet, r={1: lambda progress: 0.25 + 0.5 * progress, 2: 0.5})
    for timestep, kept in ((1000, 16), (500, 32), (0, 48)):
        run(unet, [timestep], embedding())
        assert {(layer.downsample, layer.kept) for layer in summary(unet).layers} == {(1, kept), (2, 8)}


def test_a_share_of_one_merges_nothing_at_that_moment(unet):
    apply_patch(unet, r=lambda progress: 1.0 if progress < 0.5 else 0.5)
    merged = run(unet, [400], embedding())
    early = run(unet, [900], embedding())
    remove_patch(unet)
    assert torch.equal(early, run(unet, [900], embedding()))
    assert not torch.equal(merged, run(unet, [400], embedding()))


SCHEDULERS = [
    (DDIMScheduler(clip_sample=False, steps_offset=1), 2),  # timesteps a, b, c: grouped at a and c
    (PNDMScheduler(skip_prk_steps=True, steps_offset=1), 2),  # a, b, b, c: at a and the second b
    (HeunDiscreteScheduler(steps_offset=1), 3),  # a, b, b, c, c: at a, the second b and the second c
]


@pytest.mark.parametrize(("scheduler", "expected"), SCHEDULERS)
def test_schedulers(components, scheduler, expected):
    """A timestep that comes again is grouped again: it may be another run of the same prompt."""
    pipe = apply_patch(Pipeline(**components | {"scheduler": scheduler}, **PARTS), refresh_every=2)
    first = draw(pipe, text(1), height=16, width=16)
    assert counts(pipe) == [expected] * LAYERS
    assert np.array_equal(draw(pipe, text(1), height=16, width=16), first)
    assert counts(pipe) == [expected] * LAYERS


def test_img2img_and_guidance_switched_off_half_way(components):
    pipe = apply_patch(StableDiffusionImg2ImgPipeline(**components, **PARTS), refresh_every=10, share_guidance=True)
    image = torch.rand(1, 3, 16, 16)
    draw(pipe, text(1), image=image, strength=0.7)
    assert counts(pipe) == [1] * LAYERS

    def switch_off(pipe: Any, step: int, timestep: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if step == 0:
            pipe._guidance_scale = 0.0
            tensors["prompt_embeds"] = tensors["prompt_embeds"][-1:]
        return tensors

    tensors = ["latents", "prompt_embeds"]
    draw(
        pipe,
        text(1),
        image=image,
        strength=1.0,
        callback_on_step_end=switch_off,
        callback_on_step_end_tensor_inputs=tensors,
    )
    assert counts(pipe) == [2] * LAYERS


@torch.no_grad()
@pytest.mark.parametrize(
    "config",
    [ATCConfig(refresh_every=2, window=4), ATCConfig(share_guidance=True, share_layers=True), ATCConfig.fast()],
)
def test_reuse_compiles_whole_and_settles(unet, config):
    """Within the first clustering that knows the guidance's parts, here the fourth step at the latest."""
    prompt, latents = embedding(2), sample().repeat(2, 1, 1, 1)
    inputs = [(latents + t / 1000, torch.tensor(t), prompt) for t in range(900, 100, -100)]
    expected = [apply_patch(unet, config)(*x).sample for x in inputs[:1]] + [unet(*x).sample for x in inputs[1:]]
    torch.compiler.reset()
    compiled = torch.compile(unet, fullgraph=True, backend="eager")
    for x, output in zip(inputs[:4], expected, strict=False):
        assert torch.allclose(compiled(*x).sample, output, atol=1e-4)
    with torch.compiler.set_stance("fail_on_recompile"):
        for x, output in zip(inputs[4:], expected[4:], strict=True):
            assert torch.allclose(compiled(*x).sample, output, atol=1e-4)
    torch.compiler.reset()
