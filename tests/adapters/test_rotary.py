"""Rotary transformers: attention with merged keys beside an explicit reference, backends, and what comes beside it."""

import copy
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from diffusers import FirstBlockCacheConfig
from diffusers.models.attention_dispatch import attention_backend
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from peft import LoraConfig
from torch import Tensor

from atc_diffusion import ATCConfig, MergeMap, apply_patch, merge_maps, remove_patch, summary
from atc_diffusion.testing import TinyNetwork, draw
from tests.helpers.attentions import attentions, recorded_calls, recorded_results
from tests.helpers.families import FAMILIES, ROTARY

FUNCTIONS = {
    kind: f"diffusers.models.transformers.transformer_{module}.dispatch_attention_fn"
    for kind, module in {"flux": "flux", "qwen": "qwenimage", "z": "z_image"}.items()
}
TEXT = {"flux": 5, "qwen": 5, "z": 0}  # tokens ahead of the picture's, in the sequence that is attended to
NUM_TOKENS = 24
FEW_KEYS: dict[str, Any] = {"r": 1, "r_keys": 0.25}


@pytest.fixture(params=ROTARY)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@torch.no_grad()
@pytest.mark.parametrize("weigh", [True, False])
@pytest.mark.parametrize("features", ["keys", "values", "hidden_states"])
def test_attention_is_that_to_means_of_clusters(monkeypatch, name, weigh, features):
    """The original processor, with its attention written out over tokens that are the means of their clusters."""
    family, kind = FAMILIES[name], name.split("_")[0]
    network = family.make()
    calls = recorded_calls(network)
    apply_patch(network, **FEW_KEYS, proportional_attention=weigh, features=features, record=True)
    results = recorded_results(network)
    family.run(network)
    maps = {network.get_submodule(merge.layer): merge.keys for merge in merge_maps(network) if merge.keys}
    remove_patch(network)
    assert len(maps) == family.layers
    for attention, merge_map in maps.items():
        reference = Reference(merge_map, TEXT[kind], weigh)
        monkeypatch.setattr(FUNCTIONS[kind], reference)
        args, kwargs = calls[attention]
        actual, expected = results[attention], attention(*args, **kwargs)
        for part, other in zip(as_tuple(actual), as_tuple(expected), strict=True):
            assert torch.allclose(part, other, atol=1e-5)


class Reference:
    """Attention to all keys, of which those of the picture are the means of their clusters.

    Without weights, a cluster of n keys loses log n in each of its logits, so that it weighs as much as one.
    """

    def __init__(self, merge_map: MergeMap, start: int, weigh: bool) -> None:
        self.merge_map, self.start, self.weigh = merge_map, start, weigh

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **_: Any) -> Tensor:
        query, key, value = (x.transpose(1, 2) for x in (query, self._means(key), self._means(value)))
        logits = query @ key.mT / query.shape[-1] ** 0.5
        if attn_mask is not None:
            logits = logits.masked_fill(~attn_mask, -torch.inf)
        if not self.weigh:
            sizes = self.merge_map.unmerge(self.merge_map.sizes[..., None].float())[:, None, None, :, 0]
            logits[..., self.start : self.start + NUM_TOKENS] -= sizes.log()
        return (logits.softmax(dim=-1) @ value).transpose(1, 2)

    def _means(self, x: Tensor) -> Tensor:
        before, picture, after = x.split([self.start, NUM_TOKENS, x.shape[1] - self.start - NUM_TOKENS], dim=1)
        means = self.merge_map.unmerge(self.merge_map.merge(picture.flatten(2)))
        return torch.cat([before, means.unflatten(2, x.shape[2:]), after], dim=1)


def as_tuple(output: Any) -> tuple[Tensor, ...]:
    return output if isinstance(output, tuple) else (output,)


@pytest.mark.parametrize("config", [ATCConfig(), ATCConfig(r=0.5, r_keys=0.25), ATCConfig.paper(0.6)])
def test_merging_queries_is_refused_before_anything_is_changed(name, config):
    network = FAMILIES[name].make()
    processors = [attention.processor for attention in attentions(network)]
    with pytest.raises(ValueError, match=r"so only its keys can merge; use r=1 and a share for r_keys"):
        apply_patch(network, config)
    assert all(a is attention.processor for a, attention in zip(processors, attentions(network), strict=True))


@pytest.mark.parametrize("name", ["flux", "flux_kontext", "flux_controlnet"])
def test_a_backend_without_masks_gets_the_weights_in_wider_heads(name):
    family = FAMILIES[name]
    network = apply_patch(family.make(), **FEW_KEYS)
    expected = family.run(network)
    for attention in attentions(network):
        attention.set_attention_backend("_native_flash")
    assert torch.allclose(family.run(network), expected, atol=1e-5)
    remove_patch(network)
    assert {attention.processor._attention_backend.value for attention in attentions(network)} == {"_native_flash"}


def test_the_backend_of_a_context_is_noticed():
    family = FAMILIES["flux"]
    network = apply_patch(family.make(), **FEW_KEYS)
    expected = family.run(network)
    with attention_backend("_native_flash"):
        assert torch.allclose(family.run(network), expected, atol=1e-5)
    with attention_backend("_native_math"):
        assert torch.allclose(family.run(network), expected, atol=1e-5)


def test_a_backend_that_cannot_weigh_keys_is_refused_by_the_patch_and_leaves_its_layer_unmerged_later():
    family = FAMILIES["flux"]
    network: Any = apply_patch(family.make(), **FEW_KEYS)
    network.transformer_blocks[1].attn.set_attention_backend("sage")
    message = r"attends through the backend 'sage', .* call set_attention_backend with one of"
    with (
        pytest.warns(UserWarning, match=f"transformer_blocks.1.attn stays unmerged: it {message}"),
        pytest.raises(TypeError, match="not callable"),  # sage is not installed
    ):
        family.run(network)
    with pytest.raises(ValueError, match=f"transformer_blocks.1.attn {message}"):
        apply_patch(network, **FEW_KEYS)


@torch.no_grad()
def test_attention_of_another_package_is_refused(name, monkeypatch):
    family = FAMILIES[name]
    network = family.make()
    monkeypatch.setattr(FUNCTIONS[name.split("_")[0]], ring_attention)
    with pytest.raises(ValueError, match=f"attends by code of {__name__}, not by diffusers' dispatch_attention_fn; un"):
        apply_patch(network, **FEW_KEYS)


def ring_attention(*args: Any, **kwargs: Any) -> Tensor:
    raise NotImplementedError


def test_any_other_processor_is_refused():
    network: Any = FAMILIES["flux"].make()
    network.transformer_blocks[0].attn.set_processor(FluxIPAdapterAttnProcessor(16, 12))
    with pytest.raises(ValueError, match=r"blocks.0.attn has a .*FluxIPAdapterAttnProcessor: merging here needs"):
        apply_patch(network, **FEW_KEYS)


@pytest.mark.parametrize("patch_first", [True, False])
def test_fused_projections_give_the_same_picture(name, patch_first):
    family = FAMILIES[name]
    network: Any = family.make()
    if not hasattr(network, "fuse_qkv_projections"):
        pytest.skip("has no fuse_qkv_projections")
    expected = family.run(apply_patch(network, **FEW_KEYS))
    if not patch_first:
        remove_patch(network)
    network.fuse_qkv_projections()
    if not patch_first:
        apply_patch(network, **FEW_KEYS)
    assert torch.allclose(family.run(network), expected, atol=1e-5)
    network.unfuse_qkv_projections()
    assert torch.allclose(family.run(network), expected, atol=1e-5)


@pytest.mark.parametrize("name", ["flux", "qwen_image"])
def test_first_block_cache_skips_blocks_that_merge(name):
    family = FAMILIES[name]
    network: Any = apply_patch(family.make(), **FEW_KEYS)
    expected = family.run(network)
    network.enable_cache(FirstBlockCacheConfig(threshold=0.5))
    with network.cache_context("cond"):
        assert torch.equal(family.run(network, 10), expected)
        assert family.run(network, 9).isfinite().all()
    calls = [len(layer.kept) for layer in summary(network).layers]
    assert calls[-1] < calls[0]
    network.disable_cache()
    assert torch.equal(family.run(network), expected)


def test_lora_adapters_come_and_go(name):
    family = FAMILIES[name]
    network: Any = family.make()
    before = family.run(network)
    plain = family.run(apply_patch(network, **FEW_KEYS))
    network.add_adapter(LoraConfig(target_modules=["to_k", "to_v"], init_lora_weights=False))
    adapted = family.run(network)
    assert adapted.isfinite().all()
    assert not torch.allclose(adapted, plain, atol=1e-4)
    network.disable_adapters()
    assert torch.allclose(family.run(network), plain, atol=1e-6)
    assert torch.allclose(family.run(remove_patch(network)), before, atol=1e-6)


@pytest.mark.parametrize("name", ["flux_kontext", "qwen_image", "z_image"])
def test_threads_do_not_meet(name):
    family = FAMILIES[name]
    network = apply_patch(family.make(), **FEW_KEYS)
    sizes = [(8, 12), (12, 8), (8, 8), (4, 12)] * 2
    expected = [family.run(network, size=size) for size in sizes]
    with ThreadPoolExecutor(4) as pool:
        actual = list(pool.map(lambda size: family.run(network, size=size), sizes))
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("name", ["flux", "qwen_image", "z_image"])
def test_gradients_are_the_same_with_checkpoints(name):
    family = FAMILIES[name]
    network: Any = apply_patch(family.make().train().requires_grad_(True), **FEW_KEYS)
    inputs = family.inputs(8, 12) | family.timestep(torch.full((2,), 500.0))
    gradients = []
    for checkpoint in (network.disable_gradient_checkpointing, network.enable_gradient_checkpointing):
        checkpoint()
        network.zero_grad()
        output = network(**inputs, return_dict=False)[0]
        (torch.stack(output) if isinstance(output, list) else output).square().sum().backward()
        gradients.append([copy.copy(p.grad) for p in network.parameters() if p.grad is not None])
    assert gradients[0]
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(*gradients, strict=True))


def test_a_mask_is_refused_where_keys_of_flux_merge():
    family = FAMILIES["flux"]
    network = family.make()
    masked: dict[str, Any] = {"joint_attention_kwargs": {"attention_mask": torch.ones(2, 1, 1, 29, dtype=torch.bool)}}
    before = family.run(network, **masked)
    apply_patch(network, **FEW_KEYS)
    with pytest.raises(ValueError, match=r"merging takes no attention_mask here; leave it out"):
        family.run(network, **masked)
    assert torch.equal(family.run(apply_patch(network, r=1, r_keys=1), **masked), before)


def test_pictures_of_several_sizes_in_one_call_of_z_image_are_refused():
    family = FAMILIES["z_image"]
    network = apply_patch(family.make(), **FEW_KEYS)
    with pytest.raises(ValueError, match=r"Z-Image takes one image for each prompt, all of one size; call rem"):
        family.run(network, x=[draw(4, 1, 8, 12), draw(4, 1, 8, 8)])


def test_the_summary_counts_the_projections_of_all_tokens():
    family = FAMILIES["flux"]
    network = apply_patch(family.make(), **FEW_KEYS)
    family.run(network)
    channels, kept = 16, NUM_TOKENS // 4
    saved = NUM_TOKENS * (NUM_TOKENS - kept) / (2 * channels * NUM_TOKENS + NUM_TOKENS**2)
    assert summary(network).work_saved == pytest.approx(saved)


def test_no_token_of_a_reference_picture_is_merged():
    family: TinyNetwork = FAMILIES["flux_kontext"]
    network = apply_patch(family.make(), **FEW_KEYS, record=True)
    family.run(network)
    assert {merge.grid for merge in merge_maps(network)} == {(4, 6)}
    assert {layer.tokens for layer in summary(network).layers} == {NUM_TOKENS}
