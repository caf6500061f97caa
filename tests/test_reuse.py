"""Which clusters serve again: counted, and compared with reclustering at every call."""

import copy
import io
import math
import random
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


@torch.no_grad()
def drift(unet: Any, moves: list[float], steps: Tensor, latents: Tensor, text: Tensor) -> list[Tensor]:
    """Outputs for latents that move away from where they were, by shares of their norm."""
    return [unet((1 + move) * latents, t, text).sample for move, t in zip(moves, steps, strict=True)]


MOVES = [0.0, 0.04, 0.08, 0.12, 0.16, 0.2]  # in six steps


@pytest.mark.parametrize(("threshold", "expected"), [(0, 6), (0.05, 3), (0.09, 2), (0.3, 1)])
@pytest.mark.parametrize("make_steps", [timesteps, lambda *values: list(values)])  # any loop, with a scheduler or not
def test_clusters_serve_until_the_latents_have_moved(unet, threshold, expected, make_steps):
    apply_patch(unet, recluster_threshold=threshold)
    drift(unet, MOVES, make_steps(900, 700, 500, 300, 100, 0), sample(), embedding())
    assert counts(unet) == [expected] * LAYERS


@pytest.mark.parametrize("threshold", [0.02, 0.005])
def test_the_error_of_reuse_falls_with_the_threshold(unet, threshold):
    """The law of reuse: outputs are those of reclustering at every call, up to a bound that falls to zero."""
    steps = timesteps(900, 700, 500, 300, 100, 0)
    moves = [move * threshold / 0.2 for move in MOVES]
    exact = drift(apply_patch(unet, r=1.0, r_keys=0.5, recluster_threshold=0), moves, steps, sample(), embedding())
    reused = drift(
        apply_patch(unet, r=1.0, r_keys=0.5, recluster_threshold=threshold), moves, steps, sample(), embedding()
    )
    assert counts(unet) == [1] * LAYERS
    assert max(float((a - b).norm() / b.norm()) for a, b in zip(reused, exact, strict=True)) < threshold


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


def test_a_patched_model_can_be_pickled_within_a_run(unet):
    apply_patch(unet, recluster_threshold=0.3)
    steps = timesteps(900, 700)
    run(unet, steps[:1], embedding())
    buffer = io.BytesIO()
    torch.save(unet, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert torch.equal(run(loaded, steps[1:], embedding()), run(apply_patch(unet), steps[1:], embedding()))


@torch.no_grad()
def test_tiles_with_one_text_keep_their_own_clusters(unet):
    apply_patch(unet, recluster_threshold=0.3)
    tiles, steps, prompt = [sample() + i for i in range(3)], timesteps(900, 700, 500), embedding()
    together = [unet(tile + t / 10000, t, prompt).sample for t in steps for tile in tiles]
    assert counts(unet) == [3] * LAYERS
    for i, tile in enumerate(tiles):
        alone = [unet(tile + t / 10000, t, prompt).sample for t in timesteps(900, 700, 500)]
        assert all(torch.equal(a, b) for a, b in zip(alone, together[i::3], strict=True))


@torch.no_grad()
def test_two_runs_that_step_in_turn_keep_their_own_clusters(unet):
    apply_patch(unet, recluster_threshold=0.3)
    runs = [(sample() + i, timesteps(900, 700, 500)) for i in range(2)]
    alone = [[unet(x + t / 1000, t, embedding()).sample for t in steps] for x, steps in runs]
    in_turn = [[unet(x + steps[i] / 1000, steps[i], embedding()).sample for x, steps in runs] for i in range(3)]
    assert all(torch.equal(alone[r][i], in_turn[i][r]) for r in range(2) for i in range(3))


MOVING = torch.nn.functional.interpolate(sample(size=6)[..., :6], size=24, mode="bicubic")


PLACES = [(y, x) for y in (0, 8, 16) for x in (0, 8, 16)]


@torch.no_grad()
def test_tiles_that_move_get_no_clusters_of_other_tiles(unet):
    """As in MultiDiffusion and DemoFusion."""
    outputs = []
    for threshold in (0.01, 0):
        apply_patch(unet, r=0.5, recluster_threshold=threshold)
        canvases = [(t, MOVING.roll((3 * i, 5 * i), (2, 3))) for i, t in enumerate(timesteps(900, 800, 700, 600))]
        tiles = [(canvas[:, :, y : y + 8, x : x + 8], t) for t, canvas in canvases for y, x in PLACES]
        outputs.append([unet(tile, t, embedding()).sample for tile, t in tiles])
    assert all(map(torch.equal, *outputs))


@torch.no_grad()
def test_tiles_keep_their_clusters_in_any_order(unet):
    outputs = []
    for seed in range(2):
        apply_patch(unet, r=0.5)
        order, drawn = random.Random(seed), {}
        for t in timesteps(900, 800, 700, 600):
            for y, x in order.sample(PLACES, len(PLACES)):
                drawn[int(t), y, x] = unet(MOVING[:, :, y : y + 8, x : x + 8], t, embedding()).sample
        assert counts(unet) == [len(PLACES)] * LAYERS
        outputs.append([drawn[key] for key in sorted(drawn)])
    assert all(map(torch.equal, *outputs))


@torch.no_grad()
def test_samples_of_a_micro_batch_get_no_clusters_of_other_samples(unet):
    x, text = torch.randn(8, 4, 8, 8), torch.randn(8, 5, 12)
    drawn = torch.randint(0, 1000, (8,), generator=torch.Generator().manual_seed(0))
    outputs = []
    for threshold in (0.15, 0):
        apply_patch(unet, r=0.5, recluster_threshold=threshold)
        outputs.append([unet(x[i : i + 1], drawn[i : i + 1], text[i : i + 1]).sample for i in range(8)])
    assert all(map(torch.equal, *outputs))


@torch.no_grad()
def test_an_ensemble_with_the_condition_first_is_as_its_items(unet):
    """As in Marigold: the condition, equal for all items, stands in the first channels."""
    condition, latents, steps = sample()[:, :2].repeat(2, 1, 1, 1), sample(2)[:, 2:], timesteps(900, 700, 500)
    x = torch.cat([condition, latents], dim=1)
    apply_patch(unet, r=0.5, recluster_threshold=0.1)
    both = [unet(x + t / 1000, t, embedding(1).repeat(2, 1, 1)).sample for t in steps]
    for i in range(2):
        alone = [unet(x[i : i + 1] + t / 1000, t, embedding()).sample for t in timesteps(900, 700, 500)]
        assert all(torch.allclose(a[i : i + 1], b, atol=1e-4) for a, b in zip(both, alone, strict=True))


def test_guidance_skipped_at_every_other_step_goes_on(unet):
    apply_patch(unet, recluster_threshold=0.3)
    for i, t in enumerate(timesteps(900, 800, 700, 600, 500, 400)):
        batch = 1 + i % 2
        unet((1 + i / 100) * sample().repeat(batch, 1, 1, 1), t, embedding().repeat(batch, 1, 1))
    assert counts(unet) == [2] * LAYERS


@torch.no_grad()
def test_an_attention_that_is_called_twice_in_a_call_is_right(unet):
    """As in reference-only pipelines: a second time for the unconditional half, which attends to the reference."""
    block = unet.down_blocks[0].attentions[0].transformer_blocks[0]

    def forward(hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **_: Any) -> Tensor:
        n = block.norm1(hidden_states)
        attended = block.attn1(n)
        hidden_states = hidden_states + torch.cat([block.attn1(n[:1]), attended[1:]])
        return hidden_states + block.attn2(block.norm2(hidden_states), encoder_hidden_states=encoder_hidden_states)

    block.forward = forward
    x, text = sample(2), embedding(2)
    for threshold in (0, 0.3):
        apply_patch(unet, r=1.0, r_keys=0.5, recluster_threshold=threshold, share_guidance=False)
        outputs = [unet((1 + i / 100) * x, t, text).sample for i, t in enumerate(timesteps(900, 700))]
        alone = [unet((1 + i / 100) * x[:1], t, text[:1]).sample for i, t in enumerate(timesteps(900, 700))]
        assert all(torch.allclose(both[:1], one, atol=1e-5) for both, one in zip(outputs, alone, strict=True))


def test_a_network_called_within_another_has_its_own_call(unet):
    inner, steps = copy.deepcopy(unet), timesteps(900, 700)
    expected = run(apply_patch(copy.deepcopy(unet), r=0.5), steps, embedding())
    apply_patch(inner, r=0.5)
    apply_patch(unet, r=0.5)
    unet.conv_in.register_forward_hook(lambda *_: inner(sample(), steps[0], embedding()) and None)
    assert torch.equal(run(unet, steps, embedding()), expected)


def test_a_forward_called_past_the_hooks_is_refused(unet):
    apply_patch(unet)
    with pytest.raises(ValueError, match="was called outside its network's call; call the network itself"):
        unet.forward(sample(), timesteps(900, 700)[0], embedding())


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
    apply_patch(unet, share_layers=2, levels="all", recluster_threshold=0)
    run(unet, timesteps(900, 500), embedding())
    clusterings = {level: [x.clusterings for x in summary(unet).layers if x.level == level] for level in (1, 2)}
    assert clusterings == {1: [2, 0, 2], 2: [2, 0, 0, 2]}  # the last but one runs after the last: the mid block


@pytest.mark.parametrize(("parts", "pictures"), [(2, 1), (2, 3), (3, 1), (3, 2)])
def test_guidance_parts_share_from_the_second_step(unet, parts, pictures):
    """Also where all pictures begin with the same latents."""
    prompt, steps = 30 * embedding(parts * pictures), timesteps(900, 700)
    apply_patch(unet, share_guidance=True, recluster_threshold=0, record=True)
    run(unet, steps[:1], prompt, sample().repeat(parts * pictures, 1, 1, 1))
    run(unet, steps[1:], prompt, sample(pictures).repeat(parts, 1, 1, 1))
    first, last = (labels(unet)[i] for i in (LAYERS - 1, 2 * LAYERS - 1))
    assert not torch.equal(first[:pictures], first[-pictures:])
    assert all(torch.equal(part, last[:pictures]) for part in last.split(pictures))


def test_shared_clusters_are_those_of_the_last_part(unet):
    prompt, latents, steps = 30 * embedding(2), sample().repeat(2, 1, 1, 1), timesteps(900, 700)
    runs = []
    for share in (True, False):
        apply_patch(unet, share_guidance=share, recluster_threshold=0)
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
    apply_patch(unet, share_guidance=True, recluster_threshold=0)
    shared = run(unet, steps, prompt, latents)
    apply_patch(unet, share_guidance=False, recluster_threshold=0)
    assert torch.equal(shared, run(unet, steps, prompt, latents))


@pytest.mark.parametrize("config", [{"r": 1.0, "r_keys": lambda p: 0.25 + 0.5 * p}, {"r": lambda p: 0.75 - 0.5 * p}])
def test_the_share_asked_for_at_a_step_is_the_share_kept(unet, config):
    """Between clusterings too: the tree is cut again at every step."""
    apply_patch(unet, recluster_threshold=0.09, **config)
    drift(unet, MOVES[:5], timesteps(900, 700, 500, 300, 100), sample(), embedding())
    rising = (16, 24, 32, 40, 48)
    layer = summary(unet).layers[0]
    assert layer.kept_keys == (rising if "r_keys" in config else rising[::-1])
    assert layer.clusterings == 2
    assert f"{layer.kept_keys[0]}..{layer.kept_keys[-1]}" in str(summary(unet))


def test_cutting_a_cached_tree_again_is_reclustering_the_same_features(unet):
    """In the first layer, whose features do not depend on what is merged."""
    runs = []
    for threshold in (0, 0.3):
        apply_patch(unet, r=lambda p: 0.25 + 0.5 * p, recluster_threshold=threshold, record=True)
        for t in timesteps(900, 900, 900):
            unet(sample(), t, embedding())
        runs.append(labels(unet)[::LAYERS])
    assert all(torch.equal(again, cached) for again, cached in zip(*runs, strict=True))


def test_progress_without_a_schedule_is_by_the_timestep(unet):
    apply_patch(unet, r={1: lambda progress: 0.25 + 0.5 * progress, 2: 0.5})
    for timestep, kept in ((1000, 16), (500, 32), (0, 48)):
        unet(sample(), timestep, embedding())
        assert {(layer.level, layer.kept[-1]) for layer in summary(unet).layers} == {(1, kept), (2, 8)}


def test_a_share_of_one_merges_nothing_at_that_moment(unet):
    apply_patch(unet, r=lambda progress: 1.0 if progress < 0.5 else 0.5)
    early, merged = (unet(sample(), t, embedding()).sample for t in (900, 400))
    remove_patch(unet)
    assert torch.equal(early, unet(sample(), 900, embedding()).sample)
    assert not torch.equal(merged, unet(sample(), 400, embedding()).sample)


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
        ATCConfig(r=0.5, recluster_threshold=0, features="hidden_states"),
        ATCConfig(r=lambda progress: 0.25 + 0.5 * progress),
        ToMeConfig(r=0.5),
    ],
)
def test_a_gradient_checkpoint_recomputes_with_the_clusters_it_had(unet, config):
    assert torch.equal(gradient(unet, True, config), gradient(unet, False, config))


def test_an_inference_run_leaves_nothing_that_training_would_trip_over(unet):
    apply_patch(unet.requires_grad_(True), recluster_threshold=0.3)
    steps = timesteps(900, 700)
    with torch.inference_mode():
        unet(sample(), steps[0], embedding())
    unet(sample(), steps[1], embedding()).sample.sum().backward()


@torch.no_grad()
@pytest.mark.parametrize("config", [ATCConfig(window_size=4), ATCConfig.fast()])
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
