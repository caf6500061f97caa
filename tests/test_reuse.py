"""Which clusters serve again: counted, and compared with clustering anew."""

import copy
import io
import warnings
from concurrent.futures import ThreadPoolExecutor
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

from atc_diffusion import ATCConfig, ToMeConfig, apply_patch, merge_maps, remove_patch, summary
from tests.test_pipelines import PARTS, draw, text

LAYERS = 3


def counts(model: Any) -> list[int]:
    return [layer.clusterings for layer in summary(model).layers]


def labels(unet: Any) -> list[Tensor]:
    """Of the queries, by step and layer."""
    return [merge.queries.labels for merge in merge_maps(unet) if merge.queries is not None]


def embedding(items: int = 1) -> Tensor:
    return torch.randn(items, 5, 12, generator=torch.Generator().manual_seed(1))


def sample(items: int = 1, size: int = 8) -> Tensor:
    return torch.randn(items, 4, size, 8, generator=torch.Generator().manual_seed(items))


def timesteps(*values: int) -> Tensor:
    return torch.tensor(values)


@torch.no_grad()
def run(unet: Any, steps: Tensor, text: Tensor, latents: Tensor | None = None) -> Tensor:
    """A denoising loop; returns its last output."""
    latents = sample(len(text)) if latents is None else latents
    for timestep in steps:
        latents = unet(latents, timestep, text).sample
    return latents


@pytest.mark.parametrize(("refresh_every", "expected"), [(1, 6), (2, 3), (3, 2), (4, 2), (10, 1)])
def test_clusters_serve_so_many_steps(unet, refresh_every, expected):
    apply_patch(unet, refresh_every=refresh_every)
    run(unet, timesteps(900, 700, 500, 300, 100, 0), embedding())
    assert counts(unet) == [expected] * LAYERS


def test_a_text_made_anew_at_every_step_does_not_matter(unet):
    apply_patch(unet, refresh_every=10)
    for timestep in timesteps(900, 700, 500):
        unet(sample(2), timestep[None].expand(2), torch.cat([embedding(), embedding()]))
    assert counts(unet) == [1] * LAYERS


def test_a_new_run_starts_afresh_also_with_the_same_timesteps(unet):
    apply_patch(unet, refresh_every=10)
    steps, prompt = timesteps(900, 500), embedding()
    first = run(unet, steps, prompt)
    run(unet, steps, prompt, sample() + 1)
    assert torch.equal(run(unet, steps, prompt), first)
    assert counts(unet) == [1] * LAYERS


@pytest.mark.parametrize("change", ["shape", "batch", "dtype", "inference mode"])
def test_what_changes_within_a_run_starts_afresh(unet, change):
    apply_patch(unet, refresh_every=10)
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
    apply_patch(unet, refresh_every=10)
    expected = run(unet, timesteps(900, 700), embedding())
    handle = unet.mid_block.register_forward_pre_hook(lambda module, args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(unet, timesteps(900, 700), embedding() + 1)
    handle.remove()
    assert torch.equal(run(unet, timesteps(900, 700), embedding()), expected)
    assert counts(unet) == [1] * LAYERS


def test_two_models_never_share(unet):
    apply_patch(unet, refresh_every=10)
    steps, other = timesteps(900, 700), sample() + 1
    run(unet, steps[:1], embedding())
    clone = copy.deepcopy(unet)
    expected = run(apply_patch(copy.deepcopy(unet)), steps[1:], embedding(), other)
    assert torch.equal(run(clone, steps[1:], embedding(), other), expected)
    assert not torch.equal(run(unet, steps[1:], embedding(), other), expected)


def test_a_patched_model_can_be_pickled_within_a_run(unet):
    apply_patch(unet, refresh_every=10)
    steps = timesteps(900, 700)
    run(unet, steps[:1], embedding())
    buffer = io.BytesIO()
    torch.save(unet, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert torch.equal(run(loaded, steps[1:], embedding()), run(apply_patch(unet), steps[1:], embedding()))


@torch.no_grad()
def test_tiles_with_one_text_keep_their_own_clusters(unet):
    apply_patch(unet, refresh_every=10)
    tiles, steps, prompt = [sample() + i for i in range(3)], timesteps(900, 700, 500), embedding()
    together = [unet(tile + t / 1000, t, prompt).sample for t in steps for tile in tiles]
    assert counts(unet) == [3] * LAYERS
    for i, tile in enumerate(tiles):
        alone = [unet(tile + t / 1000, t, prompt).sample for t in timesteps(900, 700, 500)]
        assert all(torch.equal(a, b) for a, b in zip(alone, together[i::3], strict=True))


@torch.no_grad()
def test_two_runs_that_step_in_turn_keep_their_own_clusters(unet):
    apply_patch(unet, refresh_every=10)
    runs = [(sample() + i, timesteps(900, 700, 500)) for i in range(2)]
    alone = [[unet(x + t / 1000, t, embedding()).sample for t in steps] for x, steps in runs]
    in_turn = [[unet(x + steps[i] / 1000, steps[i], embedding()).sample for x, steps in runs] for i in range(3)]
    assert all(torch.equal(alone[r][i], in_turn[i][r]) for r in range(2) for i in range(3))


def test_random_timesteps_are_clustered_anew(unet):
    """Score distillation and training draw timesteps; falling ones must not look like a run."""
    apply_patch(unet, refresh_every=10)
    draws = [torch.tensor([t]) for t in (900, 700, 500)]
    with pytest.warns(UserWarning, match=r"pass `t` of `for t in scheduler.timesteps`, or set refresh_every=1"):
        outputs = [unet(sample() + i, t, embedding()).sample for i, t in enumerate(draws)]
    apply_patch(unet, refresh_every=1)
    assert all(torch.equal(unet(sample() + i, t, embedding()).sample, outputs[i]) for i, t in enumerate(draws))


def test_what_is_not_recognised_is_said_once_and_only_where_reuse_was_asked_for(unet):
    apply_patch(unet, refresh_every=1, share_guidance=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for t in (900, 700, 500):
            unet(sample(), t, embedding())
    apply_patch(unet)
    unet(sample(), 900, embedding())
    with pytest.warns(UserWarning, match="clustered anew at every call"):
        unet(sample(), 700, embedding())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        unet(sample(), 500, embedding())


def test_requests_in_threads_share_one_patched_unet(components):
    """As in diffusers' guide "Create a server": pipelines of one UNet, each with a scheduler of its own."""
    base = apply_patch(Pipeline(**components, **PARTS), r=0.6)

    def request(seed: int) -> np.ndarray:
        scheduler = DDIMScheduler.from_config(base.scheduler.config)
        pipe = Pipeline(**components | {"scheduler": scheduler}, **PARTS)
        prompt = {name: x + seed for name, x in text(1).items()}
        return draw(pipe, prompt, height=16 + 8 * (seed % 2), width=16)

    alone = [request(seed) for seed in range(8)]
    with ThreadPoolExecutor(4) as executor:
        together = list(executor.map(request, range(8)))
    assert all(np.array_equal(a, b) for a, b in zip(alone, together, strict=True))


def test_layers_of_a_level_share(unet):
    apply_patch(unet, share_layers=2, max_downsample=2, refresh_every=1)
    run(unet, timesteps(900, 500), embedding())
    clusterings = {level: [x.clusterings for x in summary(unet).layers if x.level == level] for level in (1, 2)}
    assert clusterings == {1: [2, 0, 2], 2: [2, 0, 0, 2]}  # the last but one runs after the last: the mid block


@pytest.mark.parametrize(("parts", "pictures"), [(2, 1), (2, 3), (3, 1), (3, 2)])
def test_guidance_parts_share_from_the_second_step(unet, parts, pictures):
    """Also where all pictures begin with the same latents."""
    prompt, steps = 30 * embedding(parts * pictures), timesteps(900, 700)
    apply_patch(unet, share_guidance=True, refresh_every=1, record=True)
    run(unet, steps[:1], prompt, sample().repeat(parts * pictures, 1, 1, 1))
    run(unet, steps[1:], prompt, sample(pictures).repeat(parts, 1, 1, 1))
    first, last = (labels(unet)[i] for i in (LAYERS - 1, 2 * LAYERS - 1))
    assert not torch.equal(first[:pictures], first[-pictures:])
    assert all(torch.equal(part, last[:pictures]) for part in last.split(pictures))


def test_shared_clusters_are_those_of_the_last_part(unet):
    prompt, latents, steps = 30 * embedding(2), sample().repeat(2, 1, 1, 1), timesteps(900, 700)
    runs = []
    for share in (True, False):
        apply_patch(unet, share_guidance=share, refresh_every=1)
        runs.append([run(unet, steps[i : i + 1], prompt, latents + i) for i in range(2)])
    shared, exact = runs
    assert torch.equal(shared[0], exact[0])
    assert torch.allclose(shared[1][1], exact[1][1], atol=1e-5)
    assert not torch.allclose(shared[1][0], exact[1][0], atol=1e-5)


@pytest.mark.parametrize("seeds", [[1, 1], [1, 2]])
def test_prompts_without_guidance_never_share(unet, seeds):
    """Two prompts of one seed have equal latents at the first step, and part there."""
    prompt, steps = embedding(2), timesteps(900, 700, 500)
    latents = torch.cat([sample() * seed for seed in seeds])
    apply_patch(unet, share_guidance=True, refresh_every=1)
    shared = run(unet, steps, prompt, latents)
    apply_patch(unet, share_guidance=False, refresh_every=1)
    assert torch.equal(shared, run(unet, steps, prompt, latents))


@pytest.mark.parametrize("config", [{"r": 1.0, "r_keys": lambda p: 0.25 + 0.5 * p}, {"r": lambda p: 0.75 - 0.5 * p}])
def test_the_share_asked_for_at_a_step_is_the_share_kept(unet, config):
    """Between clusterings too: the tree is cut anew at every step."""
    apply_patch(unet, refresh_every=3, **config)
    run(unet, timesteps(900, 700, 500, 300, 100), embedding())
    rising = (16, 24, 32, 40, 48)
    layer = summary(unet).layers[0]
    assert layer.kept_keys == (rising if "r_keys" in config else rising[::-1])
    assert layer.clusterings == 2
    assert f"{layer.kept_keys[0]}..{layer.kept_keys[-1]}" in str(summary(unet))


def test_a_cached_tree_cut_anew_is_clustering_anew_of_the_same_features(unet):
    """In the first layer, whose features do not depend on what is merged."""
    runs = []
    for refresh_every in (1, 3):
        apply_patch(unet, r=lambda p: 0.25 + 0.5 * p, refresh_every=refresh_every, record=True)
        for t in timesteps(900, 900, 900):
            unet(sample(), t, embedding())
        runs.append(labels(unet)[::LAYERS])
    assert all(torch.equal(anew, cached) for anew, cached in zip(*runs, strict=True))


def test_progress_without_a_schedule_is_by_the_timestep(unet):
    apply_patch(unet, r={1: lambda progress: 0.25 + 0.5 * progress, 2: 0.5})
    for timestep, kept in ((1000, 16), (500, 32), (0, 48)):
        unet(sample(), timestep, embedding())
        assert {(layer.level, layer.kept) for layer in summary(unet).layers} == {(1, (kept,)), (2, (8,))}


def test_a_share_of_one_merges_nothing_at_that_moment(unet):
    apply_patch(unet, r=lambda progress: 1.0 if progress < 0.5 else 0.5)
    early, merged = (unet(sample(), t, embedding()).sample for t in (900, 400))
    remove_patch(unet)
    assert torch.equal(early, unet(sample(), 900, embedding()).sample)
    assert not torch.equal(merged, unet(sample(), 400, embedding()).sample)


SCHEDULERS = [  # three steps: entries of their timesteps, of which every second is clustered
    (DDIMScheduler(clip_sample=False, steps_offset=1), 2),  # a, b, c
    (PNDMScheduler(skip_prk_steps=True, steps_offset=1), 2),  # a, b, b, c
    (HeunDiscreteScheduler(steps_offset=1), 3),  # a, b, b, c, c
]


@pytest.mark.parametrize(("scheduler", "expected"), SCHEDULERS)
def test_schedulers(components, scheduler, expected):
    pipe = apply_patch(Pipeline(**components | {"scheduler": scheduler}, **PARTS), refresh_every=2)
    first = draw(pipe, text(1), height=16, width=16)
    assert counts(pipe) == [expected] * LAYERS
    assert np.array_equal(draw(pipe, text(1), height=16, width=16), first)
    assert counts(pipe) == [expected] * LAYERS


def test_summary_of_a_one_step_model_is_of_its_last_run(components):
    scheduler = EulerDiscreteScheduler(timestep_spacing="trailing", steps_offset=1)
    pipe = apply_patch(Pipeline(**components | {"scheduler": scheduler}, **PARTS))
    pipe.set_progress_bar_config(disable=True)
    for _ in range(3):
        pipe(**text(1), num_inference_steps=1, guidance_scale=1.0, height=16, width=16, output_type="latent")
        assert counts(pipe) == [1] * LAYERS


def test_img2img_and_guidance_switched_off_half_way(components):
    pipe = apply_patch(StableDiffusionImg2ImgPipeline(**components, **PARTS), refresh_every=10)
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


def gradient(unet: Any, checkpointing: bool, config: ATCConfig | ToMeConfig) -> Tensor:
    """The gradient of two unrolled steps with respect to all parameters."""
    unet = copy.deepcopy(unet).train().requires_grad_(True)
    if checkpointing:
        unet.enable_gradient_checkpointing()
    apply_patch(unet, config)
    latents, loss = sample(2), torch.zeros(())
    for timestep in timesteps(900, 700):
        latents = unet(latents, timestep, embedding(2)).sample
        loss = loss + latents.square().mean()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in unet.parameters() if p.grad is not None])


@pytest.mark.parametrize(
    "config",
    [
        ATCConfig(r=0.5),
        ATCConfig(r=0.5, refresh_every=1, features="hidden_states"),
        ATCConfig(r=lambda progress: 0.25 + 0.5 * progress),
        ToMeConfig(r=0.5),
    ],
)
def test_a_gradient_checkpoint_recomputes_with_the_clusters_it_had(unet, config):
    assert torch.equal(gradient(unet, True, config), gradient(unet, False, config))


def test_an_inference_run_leaves_nothing_that_training_would_trip_over(unet):
    apply_patch(unet.requires_grad_(True), refresh_every=10)
    steps = timesteps(900, 700)
    with torch.inference_mode():
        unet(sample(), steps[0], embedding())
    unet(sample(), steps[1], embedding()).sample.sum().backward()


@torch.no_grad()
@pytest.mark.parametrize("config", [ATCConfig(refresh_every=2, window=4), ATCConfig.fast()])
def test_reuse_compiles_whole_and_settles(unet, config):
    """Within the first clustering that knows the guidance's parts, here the fourth step at the latest."""
    prompt, latents = embedding(2), sample().repeat(2, 1, 1, 1)
    steps = torch.arange(900, 100, -100)
    apply_patch(unet, config)
    expected = [unet(latents + t / 1000, t, prompt).sample for t in steps]
    torch.compiler.reset()
    compiled = torch.compile(unet, fullgraph=True, backend="eager")
    for t, output in zip(steps[:4], expected, strict=False):
        assert torch.allclose(compiled(latents + t / 1000, t, prompt).sample, output, atol=1e-4)
    with torch.compiler.set_stance("fail_on_recompile"):
        for t, output in zip(steps[4:], expected[4:], strict=True):
            assert torch.allclose(compiled(latents + t / 1000, t, prompt).sample, output, atol=1e-4)
    torch.compiler.reset()
