"""Diffusers' hooks on attentions: guidance that perturbs some of them, and caches that keep their outputs."""

import copy
import pickle
import re
from typing import Any

import pytest
import torch
from diffusers import (
    FasterCacheConfig,
    LayerSkipConfig,
    PyramidAttentionBroadcastConfig,
    apply_faster_cache,
    apply_layer_skip,
    apply_pyramid_attention_broadcast,
)
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.smoothed_energy_guidance_utils import SmoothedEnergyGuidanceHook
from torch import Tensor, nn

from atc_diffusion import apply_patch, merge_maps, remove_patch, summary
from tests.helpers.attentions import attentions, recorded_calls, recorded_results, softmax_attention
from tests.helpers.families import FAMILIES
from tests.helpers.unet import run

# Where the blocks are of families whose attention diffusers' guidance can perturb; for others it has no rule.
BLOCKS = {
    "sd15": "down_blocks.0.attentions.0.transformer_blocks",
    "pixart": "transformer_blocks",
    "qwen_image": "transformer_blocks",
    "z_image": "layers",
}
ONE_OF_EACH = [*BLOCKS, "sd35", "flux"]
STEPS = torch.tensor([700, 600, 500])
SCORES: dict[str, Any] = {"skip_attention": False, "skip_attention_scores": True}
SKIPS: list[tuple[str, dict[str, Any]]] = [
    *((name, SCORES) for name in BLOCKS),
    *((name, {"dropout": dropout}) for name in ("sd15", "pixart", "z_image") for dropout in (1.0, 0.5)),
]


def skip(network: nn.Module, where: str, **options: Any) -> None:
    """What diffusers' guiders do before a prediction that they perturb."""
    apply_layer_skip(network, LayerSkipConfig(indices=[0], fqn=where, skip_ff=False, **options))


def stop_skipping(network: nn.Module) -> None:
    HookRegistry.check_if_exists_or_initialize(network).remove_hook("layer_skip_hook")


@torch.no_grad()
@pytest.mark.parametrize("widen_heads", [False, True])
@pytest.mark.parametrize(("name", "options"), SKIPS)
def test_an_attention_that_guidance_skips_is_as_without_a_patch(name, options, widen_heads):
    family = FAMILIES[name]
    network = family.make()
    apply_patch(network, **family.half, widen_heads=widen_heads)
    expected = family.run(network, STEPS[0])
    skip(network, BLOCKS[name], **options)
    calls, results = recorded_calls(network), recorded_results(network)
    torch.manual_seed(0)
    perturbed = family.run(network, STEPS[1])
    skipped, *others = summary(network).layers
    assert [bool(layer.limit) for layer in (skipped, *others)] == [True] + [False] * len(others)
    assert {layer.kept_keys[-1] for layer in others} == {skipped.tokens // 2}
    assert not torch.allclose(perturbed, expected, atol=1e-4)
    message = "1 of .* merged less than asked: each has a hook that works on all of its tokens: diffusers.hooks.layer_s"
    assert re.search(message, str(summary(network)))
    assert_as_without_a_patch(network, skipped.name, calls, results)
    stop_skipping(apply_patch(network, **family.half, widen_heads=widen_heads))
    assert torch.equal(family.run(network, STEPS[0]), expected)


def assert_as_without_a_patch(network: nn.Module, layer: str, calls: dict[nn.Module, Any], results: Any) -> None:
    attention = remove_patch(network).get_submodule(layer)
    args, kwargs = calls[attention]
    torch.manual_seed(0)
    for part, other in zip(as_tuple(attention(*args, **kwargs)), as_tuple(copy.copy(results[attention])), strict=True):
        assert torch.equal(part, other)


def as_tuple(output: Any) -> tuple[Tensor, ...]:
    return output if isinstance(output, tuple) else (output,)


@torch.no_grad()
@pytest.mark.parametrize("options", [{"r": 0.5}, {"r": 1, "r_keys": 0.25}])
def test_keys_merge_beside_blurred_queries(unet, options):
    """Smoothed energy guidance blurs the queries of all tokens on their grid."""
    attention = unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    registry = HookRegistry.check_if_exists_or_initialize(attention.to_q)
    registry.register_hook(SmoothedEnergyGuidanceHook(1.0), "blur")
    calls = recorded_calls(unet)
    apply_patch(unet, **options, record=True)
    results = recorded_results(unet)
    run(unet)
    keys = merge_maps(unet)[0].keys
    assert keys is not None
    assert merge_maps(unet)[0].queries is None
    (tokens,), _ = calls[attention]
    expected = softmax_attention(attention, tokens, keys.merge(tokens), keys.sizes[:, None].log())
    assert torch.allclose(results[attention], expected, atol=1e-6)


def broadcast(network: nn.Module) -> None:
    """Every second call gets the outputs of the one before."""
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500
    )
    apply_pyramid_attention_broadcast(network, config)


@torch.no_grad()
@pytest.mark.parametrize("patch_first", [True, False])
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_an_output_that_is_kept_for_the_next_call_is_of_all_tokens(name, patch_first):
    """Although the next call has other clusters, and other numbers of them."""
    family = FAMILIES[name]
    network = family.make()
    fraction: dict[str, Any] = {"r" if family.merges_queries else "r_keys": falling}
    options = {"r": 1} | fraction | {"recluster_threshold": 0}
    if not patch_first:
        broadcast(network)
    apply_patch(network, **options)
    if patch_first:
        broadcast(network)
    results, kept = recorded_results(network), []
    merged = [network.get_submodule(layer.name) for layer in summary(network).layers]
    for step in STEPS.clone():
        family.run(network, step)
        kept.append([as_tuple(results[attention]) for attention in merged])
    for first, second, third in zip(*kept, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        assert not all(torch.equal(a, b) for a, b in zip(second, third, strict=True))
    for layer in summary(network).layers:
        assert set(layer.kept) == {layer.tokens}
        assert max(layer.kept_keys) < layer.tokens


def falling(progress: float) -> float:
    return 0.75 - 0.5 * progress


@torch.no_grad()
@pytest.mark.parametrize("name", ["flux", "qwen_image"])
def test_outputs_that_are_extrapolated_are_of_all_tokens(name):
    family = FAMILIES[name]
    network: Any = apply_patch(family.make(), **family.half)
    expected = family.run(network, STEPS[0])
    hooks = pytest.importorskip("diffusers.hooks.taylorseer_cache")
    config = hooks.TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=1, max_order=1)
    hooks.apply_taylorseer_cache(network, config)
    with network.cache_context("cond"):
        outputs = [family.run(network, step) for step in STEPS.clone()]
    assert all(output.isfinite().all() for output in outputs)
    assert {kept == layer.tokens for layer in summary(network).layers for kept in layer.kept} == {True}
    assert torch.allclose(outputs[0], expected, atol=0.3)


@torch.no_grad()
@pytest.mark.parametrize("name", ["pixart", "sd35", "flux", "qwen_image"])
def test_outputs_that_faster_cache_blends_are_of_all_tokens(name):
    family = FAMILIES[name]
    fraction: dict[str, Any] = {"r" if family.merges_queries else "r_keys": falling}
    network: Any = apply_patch(family.make(), **{"r": 1} | fraction | {"recluster_threshold": 0})
    now = [900]
    config = FasterCacheConfig(
        spatial_attention_block_skip_range=2,
        current_timestep_callback=lambda: now[-1],
        attention_weight_callback=lambda module: 0.5,
        is_guidance_distilled=True,
    )
    apply_faster_cache(network, config)
    outputs = []
    for step in (900, 800, 600, 500, 400):  # the first two are computed
        now.append(step)
        outputs.append(family.run(network, torch.tensor(step)))
    assert all(output.isfinite().all() for output in outputs)
    assert {kept == layer.tokens for layer in summary(network).layers for kept in layer.kept} == {True}
    assert all("FasterCacheBlockHook" in layer.limit for layer in summary(network).layers)


def test_hooks_of_other_packages_leave_their_layer_unmerged(unet):
    attention = unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    HookRegistry.check_if_exists_or_initialize(attention).register_hook(Foreign(), "foreign")
    run(apply_patch(unet, r=0.5))
    assert [max(layer.kept) < layer.tokens for layer in summary(unet).layers] == [False, True, True]
    assert f"works on all of its tokens: {__name__}.Foreign" in str(summary(unet))


class Foreign(ModelHook):  # type: ignore[misc]  # diffusers is not annotated
    """A hook that may do anything."""


@pytest.mark.parametrize("name", ["sd35", "flux", "qwen_image", "z_image"])
def test_a_processor_that_stands_in_passes_for_the_original(name):
    """As others find it by its class; copied and pickled, it is itself."""
    family = FAMILIES[name]
    network = family.make()
    originals = [attention.processor for attention in attentions(network)]
    family.run(apply_patch(network, **family.half))
    for attention, original in zip(attentions(network), originals, strict=True):
        for processor in (attention.processor, *map(copied, (copy.copy, copy.deepcopy, pickled), [attention] * 3)):
            assert isinstance(processor, type(original))
    for attention, original in zip(attentions(remove_patch(network)), originals, strict=True):
        assert attention.processor is original


def copied(how: Any, attention: Any) -> Any:
    twin = how(attention.processor)
    assert type(twin) is type(attention.processor)
    return twin


def pickled(processor: Any) -> Any:
    return pickle.loads(pickle.dumps(processor))
