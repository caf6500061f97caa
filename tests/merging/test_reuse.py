"""How long clusters serve: counted, and compared with reclustering at every call."""

import copy
import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionImg2ImgPipeline,
)
from diffusers import StableDiffusionPipeline as Pipeline
from torch import Tensor

from atc_diffusion import apply_patch, summary
from atc_diffusion.merging import reuse
from tests.helpers.drawing import PARTS, draw, text
from tests.helpers.loops import LAYERS, MOVES, counts, drift, embedding, run, sample, timesteps


@pytest.mark.parametrize(("threshold", "expected"), [(0, 6), (0.05, 3), (0.09, 2), (0.3, 1)])
@pytest.mark.parametrize(  # any loop, with a scheduler or not, or with every fifth of its timesteps
    "make_steps", [timesteps, lambda *values: list(values), lambda *values: torch.arange(values[0], 874, -1)[::5]]
)
def test_clusters_serve_until_the_latents_have_moved(unet, threshold, expected, make_steps):
    apply_patch(unet, recluster_threshold=threshold)
    drift(unet, MOVES, make_steps(900, 898, 896, 894, 892, 890), sample(), embedding())
    assert counts(unet) == [expected] * LAYERS


@pytest.mark.parametrize("threshold", [0.02, 0.005])
def test_the_error_of_reuse_falls_with_the_threshold(unet, threshold):
    """The law of reuse: outputs are those of reclustering at every call, up to a bound that falls to zero."""
    steps = timesteps(900, 898, 896, 894, 892, 890)
    moves = [move * threshold / 0.2 for move in MOVES]
    exact = drift(apply_patch(unet, r=1.0, r_keys=0.5, recluster_threshold=0), moves, steps, sample(), embedding())
    reused = drift(
        apply_patch(unet, r=1.0, r_keys=0.5, recluster_threshold=threshold), moves, steps, sample(), embedding()
    )
    assert counts(unet) == [1] * LAYERS
    assert max(float((a - b).norm() / b.norm()) for a, b in zip(reused, exact, strict=True)) < threshold


@pytest.mark.parametrize(("most", "expected"), [(2**28, 2), (10_000, 3)])
def test_clusters_that_would_fill_too_much_memory_are_forgotten(unet, monkeypatch, most, expected):
    """Inputs of 1.3 kB, and clusters of some 20 kB."""
    monkeypatch.setattr(reuse, "MAX_BYTES", most)
    apply_patch(unet, recluster_threshold=0.3)
    for latents in (sample(), -sample(), sample()):
        unet(latents, timesteps(900)[0], embedding())
    assert counts(unet) == [expected] * LAYERS


def test_a_text_encoded_again_at_every_step_does_not_matter(unet):
    apply_patch(unet, recluster_threshold=0.3)
    for timestep in timesteps(900, 700, 500):
        unet(sample(2), timestep[None].expand(2), torch.cat([embedding(), embedding()]))
    assert counts(unet) == [1] * LAYERS


def test_a_new_run_starts_afresh_also_with_the_same_timesteps(unet):
    apply_patch(unet, recluster_threshold=0.3)
    steps, prompt = timesteps(900, 500), embedding()
    first = drift(unet, [0.0, 0.1], steps, sample(), prompt)[-1]
    drift(unet, [0.05, 0.15], steps, sample(), prompt)
    assert torch.equal(drift(unet, [0.0, 0.1], steps, sample(), prompt)[-1], first)
    assert counts(unet) == [1] * LAYERS


@pytest.mark.parametrize("change", ["shape", "batch", "dtype", "inference mode"])
def test_what_changes_within_a_run_starts_afresh(unet, change):
    apply_patch(unet, recluster_threshold=0.3)
    steps = timesteps(900, 700)
    run(unet, steps[:1], embedding())
    prompt, latents = embedding(), sample()
    if change == "shape":
        latents = sample(size=12)
    elif change == "batch":
        prompt, latents = embedding(2), sample(2)
    elif change == "dtype":
        unet, prompt, latents = unet.double(), prompt.double(), latents.double()
    with torch.inference_mode(change == "inference mode"):
        reused = run(unet, steps[1:], prompt, latents)
        assert torch.equal(reused, run(apply_patch(unet), steps[1:], prompt, latents))


def test_a_run_after_an_exception_is_right(unet):
    apply_patch(unet, recluster_threshold=math.inf)
    expected = run(unet, timesteps(900, 700), embedding())
    handle = unet.mid_block.register_forward_pre_hook(lambda module, args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(unet, timesteps(900, 700), embedding() + 1)
    handle.remove()
    assert torch.equal(run(unet, timesteps(900, 700), embedding()), expected)
    assert counts(unet) == [1] * LAYERS


def test_two_models_never_share(unet):
    apply_patch(unet, recluster_threshold=0.3)
    steps, other = timesteps(900, 700), sample() + 1
    run(unet, steps[:1], embedding())
    clone = copy.deepcopy(unet)
    expected = run(apply_patch(copy.deepcopy(unet)), steps[1:], embedding(), other)
    assert torch.equal(run(clone, steps[1:], embedding(), other), expected)


@pytest.mark.parametrize("forecast_tolerance", [0.0, 0.1])
def test_a_patched_model_can_be_pickled_within_a_run(unet, forecast_tolerance):
    apply_patch(unet, recluster_threshold=0.3, forecast_tolerance=forecast_tolerance)
    steps = timesteps(900, 700)
    run(unet, steps[:1], embedding())
    loaded = pickle.loads(pickle.dumps(unet))
    assert summary(loaded) == summary(unet)
    assert torch.equal(run(loaded, steps[1:], embedding()), run(apply_patch(unet), steps[1:], embedding()))


SCHEDULERS = [  # with the calls that they make in three steps
    (DDIMScheduler(clip_sample=False, steps_offset=1), 3),
    (PNDMScheduler(skip_prk_steps=True, steps_offset=1), 4),
    (HeunDiscreteScheduler(steps_offset=1), 5),
]


@pytest.mark.parametrize(("scheduler", "calls"), SCHEDULERS)
def test_schedulers(components, scheduler, calls):
    pipe = Pipeline(**components | {"scheduler": scheduler}, **PARTS)
    for threshold, expected in ((0, calls), (math.inf, 1)):
        apply_patch(pipe, recluster_threshold=threshold)
        first = draw(pipe, text(1), height=16, width=16)
        assert counts(pipe) == [expected] * LAYERS
        assert np.array_equal(draw(pipe, text(1), height=16, width=16), first)


def test_summary_of_a_one_step_model_is_of_its_last_run(components):
    scheduler = EulerDiscreteScheduler(timestep_spacing="trailing", steps_offset=1)
    pipe = apply_patch(Pipeline(**components | {"scheduler": scheduler}, **PARTS))
    pipe.set_progress_bar_config(disable=True)
    for _ in range(3):
        pipe(**text(1), num_inference_steps=1, guidance_scale=1.0, height=16, width=16, output_type="latent")
        assert counts(pipe) == [1] * LAYERS


def test_img2img_and_guidance_switched_off_half_way(components):
    pipe = apply_patch(StableDiffusionImg2ImgPipeline(**components, **PARTS), recluster_threshold=math.inf)
    image = torch.rand(1, 3, 16, 16)
    draw(pipe, text(1), image=image, strength=0.7)
    assert counts(pipe) == [1] * LAYERS

    def switch_off(pipe: Any, step: int, timestep: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if step == 0:
            pipe._guidance_scale = 0.0
            tensors["prompt_embeds"] = tensors["prompt_embeds"][-1:]
        return tensors

    draw(
        pipe,
        text(1),
        image=image,
        strength=1.0,
        callback_on_step_end=switch_off,
        callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"],
    )
    assert counts(pipe) == [2] * LAYERS
