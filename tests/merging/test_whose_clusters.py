"""Clusters serve only what they were made from: tiles, micro-batches, ensembles, nested calls, threads."""

import copy
import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from diffusers import StableDiffusionPipeline as Pipeline
from torch import Tensor

from atc_diffusion import apply_patch
from tests.helpers.drawing import PARTS, draw, text
from tests.helpers.loops import LAYERS, counts, embedding, run, sample, timesteps


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
