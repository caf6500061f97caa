"""Attention processors: the known ones work; others are refused, or leave their layer unmerged if they come later."""

import functools
import re
import sys
import warnings
from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import SequentialHook, add_hook_to_module
from diffusers import (
    ControlNetModel,
    PyramidAttentionBroadcastConfig,
    UNet2DConditionModel,
    apply_pyramid_attention_broadcast,
)
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    CustomDiffusionAttnProcessor,
    CustomDiffusionAttnProcessor2_0,
    PAGCFGIdentitySelfAttnProcessor2_0,
    PAGIdentitySelfAttnProcessor2_0,
    SlicedAttnProcessor,
)
from torch import Tensor

from atc_diffusion import ATCConfig, apply_patch, remove_patch, summary
from atc_diffusion.adapters.unet import MergedPerturbedAttnProcessor
from atc_diffusion.testing import UNET
from tests.helpers.attentions import recorded_calls, recorded_results, softmax_attention
from tests.helpers.drawing import MASK, PARTS, PICTURE, draw, text
from tests.helpers.unet import attend, run

# diffusers moves them to its deprecated pipelines.
attend_and_excite: Any = sys.modules[diffusers.StableDiffusionAttendAndExcitePipeline.__module__]
text_to_video_zero: Any = sys.modules[diffusers.TextToVideoZeroPipeline.__module__]

LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
SHARES: list[dict[str, Any]] = [{"r": 0.5}, {"r": 1, "r_keys": 0.25}, {"r": 0.5, "r_keys": 0.25}]
PROCESSORS = [AttnProcessor(), AttnProcessor2_0(), SlicedAttnProcessor(1)]

XL_UNET = UNET | {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 6 * 4 + 10,
}


def attention(unet: UNet2DConditionModel) -> Any:
    return unet.get_submodule(LAYER)


def assert_stays_unmerged(unet: Any, message: str) -> None:
    """One layer alone does not merge, which one warning and the summary say with this `message`."""
    with pytest.warns(UserWarning, match=f"^{LAYER} stays unmerged: it {message}"):
        run(unet)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(unet)
    merged = {layer.name for layer in summary(unet).layers if max(layer.kept_keys) < layer.tokens}
    assert merged == {layer.name for layer in summary(unet).layers} - {LAYER}
    assert re.search(f"1 of 3 merged less than asked: each {message}", str(summary(unet)))


def assert_exact(unet: Any) -> None:
    """One layer gives what it gives without a patch for its last input."""
    calls, results = recorded_calls(unet), recorded_results(unet)
    run(unet)
    args, kwargs = calls[attention(unet)]
    remove_patch(unet)
    assert torch.equal(attention(unet)(*args, **kwargs), results[attention(unet)])


@pytest.mark.parametrize("shares", SHARES)
@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize("patch_first", [True, False])
def test_known_processors_work_before_and_after_patching(unet, shares, processor, patch_first):
    expected = run(apply_patch(unet, **shares))
    if not patch_first:
        remove_patch(unet)
    unet.set_attn_processor(processor)
    if not patch_first:
        apply_patch(unet, **shares)
    assert torch.allclose(run(unet), expected, atol=1e-5)


@pytest.mark.parametrize("patch_first", [True, False])
def test_fused_projections_work_where_keys_are_those_of_the_queries(unet, patch_first):
    expected = run(apply_patch(unet, r=0.5))
    if not patch_first:
        remove_patch(unet)
    unet.fuse_qkv_projections()
    if not patch_first:
        apply_patch(unet, r=0.5)
    assert torch.allclose(run(unet), expected, atol=1e-5)
    unet.unfuse_qkv_projections()
    assert torch.equal(run(unet), expected)


def test_fused_projections_are_refused_with_keys_of_their_own(unet):
    expected = run(apply_patch(unet, r_keys=0.2))
    unet.fuse_qkv_projections()
    message = "has a .*FusedAttnProcessor2_0: keys merged apart from queries need .* unfuse_qkv_projections()"
    with pytest.raises(ValueError, match=f"{LAYER} {message}"):
        apply_patch(unet, r_keys=0.3)
    with pytest.warns(UserWarning, match=f"^3 attentions, the first {LAYER}, stay unmerged: each {message}"):
        run(unet)
    unet.unfuse_qkv_projections()
    assert torch.equal(run(unet), expected)


def test_custom_diffusion_works_where_keys_are_those_of_the_queries(unet):
    expected = run(apply_patch(unet, r=0.5))
    attention(unet).set_processor(CustomDiffusionAttnProcessor(train_kv=False, train_q_out=False, hidden_size=16))
    assert torch.allclose(run(unet), expected, atol=1e-5)
    with pytest.raises(ValueError, match="custom diffusion needs as many keys as queries; leave r_keys out"):
        apply_patch(unet, r_keys=0.2)


OTHERS = [
    text_to_video_zero.CrossFrameAttnProcessor(batch_size=2),
    text_to_video_zero.CrossFrameAttnProcessor2_0(batch_size=2),
    attend_and_excite.AttendExciteAttnProcessor(attend_and_excite.AttentionStore((4, 4)), "down"),
    CustomDiffusionAttnProcessor2_0(train_kv=False, train_q_out=False, hidden_size=16),
]


@pytest.mark.parametrize("processor", OTHERS)
def test_any_other_processor_is_refused_by_the_patch(unet, processor):
    kind = type(processor)
    attention(unet).set_processor(processor)
    before = [(type(module), len(module._forward_pre_hooks)) for module in unet.modules()]
    message = f"{LAYER} has a {kind.__module__}.{kind.__name__}: it is not known to work with merged tokens"
    with pytest.raises(ValueError, match=message):
        apply_patch(unet)
    assert [(type(module), len(module._forward_pre_hooks)) for module in unet.modules()] == before


class RegionalAttnProcessor:
    """For each item of a batch, attention to some of its tokens only, as for prompts of regions."""

    def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        half = hidden_states[:, : hidden_states.shape[1] // 2]
        return AttnProcessor2_0()(attn, hidden_states, half)


@pytest.mark.parametrize("shares", SHARES)
def test_any_other_processor_in_the_middle_of_a_run_leaves_its_layer_unmerged(unet, shares):
    expected = run(apply_patch(unet, **shares))
    ordinary = attention(unet).processor
    attention(unet).set_processor(RegionalAttnProcessor())
    assert_stays_unmerged(unet, f"has a {__name__}.RegionalAttnProcessor: it is not known to work with merged tokens")
    assert_exact(unet)
    attention(unet).set_processor(ordinary)
    assert torch.equal(run(apply_patch(unet, **shares)), expected)


def test_other_processors_may_be_where_nothing_is_merged(unet):
    expected = run(apply_patch(unet))
    processor = OTHERS[2]
    unet.mid_block.attentions[0].transformer_blocks[0].attn1.set_processor(processor)
    assert torch.allclose(run(unet), expected, atol=1e-5)
    with pytest.raises(ValueError, match="AttendExciteAttnProcessor"):
        apply_patch(unet, levels="all")


def test_a_bank_of_keys_that_attention_is_given_is_used_as_it_is(unet):
    """Reference-only control gives attn1 `encoder_hidden_states`: the picture's tokens and those of a reference."""
    tokens, bank = torch.randn(1, 16, 16), torch.randn(1, 40, 16)
    repeated = tokens[:, :4].repeat_interleave(4, dim=1)
    expected = attend(unet, repeated, encoder_hidden_states=bank)
    for shares in SHARES:
        apply_patch(unet, **shares)
        assert torch.allclose(attend(unet, repeated, encoder_hidden_states=bank), expected, atol=1e-6)
        assert not torch.allclose(attend(unet, repeated), expected, atol=1e-3)


PERTURBED = [(PAGIdentitySelfAttnProcessor2_0(), 2), (PAGCFGIdentitySelfAttnProcessor2_0(), 3)]


@pytest.mark.parametrize("proportional_attention", [True, False])
@pytest.mark.parametrize(("processor", "parts"), PERTURBED)
def test_merging_with_perturbed_attention_equals_merging_each_part(unet, processor, parts, proportional_attention):
    attn = attention(unet)
    tokens = torch.randn(2 * parts, 16, 16)
    kept, perturbed = tokens.split([2 * parts - 2, 2])
    apply_patch(unet, r=0.25, proportional_attention=proportional_attention)
    expected = attend(unet, kept)
    attn.set_processor(processor)
    output = attend(unet, tokens)
    assert torch.allclose(output[:-2], expected, atol=1e-6)
    assert all(len(item.unique(dim=0)) == 4 for item in output[-2:])
    # Of equal tokens the mean is the token: the identity attention of a perturbed part is exact there.
    equal = torch.cat([kept, perturbed[:, :1].expand(-1, 16, -1)])
    remove_patch(unet)
    exact = attend(unet, equal)[-2:]
    apply_patch(unet, r=0.25)
    assert torch.allclose(attend(unet, equal)[-2:], exact, atol=1e-6)


@pytest.mark.parametrize(("processor", "parts"), PERTURBED)
def test_perturbed_attention_with_merged_keys_is_softmax_attention_and_the_identity(unet, processor, parts):
    attn = attention(unet)
    attended = 2 * (parts - 1)
    queries, keys, mask = torch.randn(2 * parts, 16, 16), torch.randn(2 * parts, 4, 16), torch.randn(attended, 1, 4)
    attn.set_processor(MergedPerturbedAttnProcessor(processor))
    output = attn(queries, encoder_hidden_states=keys, attention_mask=mask)
    expected = softmax_attention(attn, queries[:attended], keys[:attended], mask)
    assert torch.allclose(output[:attended], expected, atol=1e-6)
    assert torch.allclose(output[attended:], attn.to_out[0](attn.to_v(queries[attended:])), atol=1e-6)


@pytest.mark.parametrize(("processor", "parts"), PERTURBED)
def test_perturbed_attention_without_keys_of_its_own_is_diffusers(unet, processor, parts):
    tokens = torch.randn(2 * parts, 16, 16)
    attention(unet).set_processor(processor)
    expected = attention(unet)(tokens)
    attention(unet).set_processor(MergedPerturbedAttnProcessor(processor))
    assert torch.equal(attention(unet)(tokens), expected)


def test_the_processor_of_perturbed_attention_is_put_back(unet):
    attention(unet).set_processor(processor := PAGIdentitySelfAttnProcessor2_0())
    run(apply_patch(unet, ATCConfig.fast()))
    assert type(attention(unet).processor) is MergedPerturbedAttnProcessor
    assert attention(remove_patch(unet)).processor is processor


def tile(attn: Any) -> None:
    """Self-attention within the halves of the sequence, as HyperTile does within tiles."""
    inner = attn.forward

    @functools.wraps(inner)
    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return torch.cat([inner(half, *args, **kwargs) for half in hidden_states.chunk(2, dim=1)], dim=1)

    attn.forward = forward


def cache(unet: UNet2DConditionModel) -> None:
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500
    )
    apply_pyramid_attention_broadcast(unet, config)


def cache_and_hook(unet: UNet2DConditionModel) -> None:
    cache(unet)
    add_hook_to_module(attention(unet), SequentialHook())


HOOKS: dict[str, Callable[[UNet2DConditionModel], Any]] = {
    "nothing": lambda unet: None,
    "accelerate": lambda unet: cpu_offload(unet, torch.device("cpu"), preload_module_classes=["BasicTransformerBlock"]),
    "sequential": lambda unet: add_hook_to_module(attention(unet), SequentialHook()),
    "casting": lambda unet: unet.enable_layerwise_casting(torch.float32, torch.float32),
    "offloading": lambda unet: unet.enable_group_offload(torch.device("cpu"), torch.device("cpu"), "leaf_level"),
    "caching": cache,
    "both": cache_and_hook,
}


@pytest.mark.parametrize("tiled_first", [True, False])
@pytest.mark.parametrize("hooks", HOOKS)
def test_a_replaced_forward_is_refused_and_hooks_around_diffusers_own_are_not(unet, hooks, tiled_first):
    if tiled_first:
        tile(attention(unet))
    HOOKS[hooks](unet)
    if tiled_first:
        with pytest.raises(ValueError, match=f"{LAYER} has its forward replaced by code of {__name__}, "):
            apply_patch(unet)
        return
    apply_patch(unet)
    run(unet)
    tile(attention(unet))
    if hooks not in ("caching", "both"):  # an output that is kept of all tokens is none of a tile
        assert_stays_unmerged(unet, f"has its forward replaced by code of {__name__}, ")
    if hooks == "nothing":
        assert_exact(unet)


def test_a_subclass_with_a_forward_of_its_own_is_refused(unet):
    class Tiled(Attention):  # type: ignore[misc]  # diffusers is not annotated
        def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return torch.cat([super(Tiled, self).forward(half) for half in hidden_states.chunk(2, dim=1)], dim=1)

    attention(unet).__class__ = Tiled
    with pytest.raises(ValueError, match=f"{LAYER} has its forward replaced by code of {__name__}, "):
        apply_patch(unet)


def test_a_processor_of_the_same_name_from_another_package_is_named_with_its_module(unet):
    foreign = type("AttnProcessor2_0", (), {"__call__": AttnProcessor2_0.__call__, "__module__": "foo.attn"})
    attention(unet).set_processor(foreign())
    message = (
        f"{LAYER} has a foo.attn.AttnProcessor2_0: it is not known to work .*; known are diffusers' AttnProcessor,"
    )
    with pytest.raises(ValueError, match=message):
        apply_patch(unet)


IMAGE: dict[str, Any] = {"image": PICTURE, "strength": 0.9}
INPAINT: dict[str, Any] = {"image": PICTURE, "mask_image": MASK, "height": 16, "width": 24}
HINT: dict[str, Any] = {"image": PICTURE, "height": 16, "width": 24}
PAG_PIPELINES = [
    ("StableDiffusionPAGPipeline", {"height": 16, "width": 24}),
    ("StableDiffusionPAGImg2ImgPipeline", IMAGE),
    ("StableDiffusionPAGInpaintPipeline", INPAINT),
    ("StableDiffusionControlNetPAGPipeline", HINT),
    ("StableDiffusionControlNetPAGInpaintPipeline", INPAINT | {"control_image": PICTURE}),
    ("StableDiffusionXLPAGPipeline", {"height": 16, "width": 24}),
    ("StableDiffusionXLPAGImg2ImgPipeline", IMAGE),
    ("StableDiffusionXLPAGInpaintPipeline", INPAINT),
    ("StableDiffusionXLControlNetPAGPipeline", HINT),
    ("StableDiffusionXLControlNetPAGImg2ImgPipeline", IMAGE | {"control_image": PICTURE}),
]


def pag_pipeline(name: str, components: dict[str, Any]) -> Any:
    """With perturbed attention in every layer of the finest level."""
    parts = components | {"pag_applied_layers": [r"down_blocks.*attentions", r"up_blocks.*attentions"]}
    if "XL" in name:
        unet = UNet2DConditionModel(**XL_UNET).eval().requires_grad_(False)
        parts |= {"unet": unet, "text_encoder_2": None, "tokenizer_2": None, "add_watermarker": False}
    else:
        parts |= PARTS
    if "ControlNet" in name:
        parts["controlnet"] = ControlNetModel.from_unet(
            parts["unet"], conditioning_embedding_out_channels=(4, 8)
        ).eval()
    return getattr(diffusers, name)(**parts)


def embeddings(name: str) -> dict[str, Tensor]:
    pooled = {"pooled_prompt_embeds": torch.ones(1, 10), "negative_pooled_prompt_embeds": torch.zeros(1, 10)}
    return text(1) | (pooled if "XL" in name else {})


@pytest.mark.parametrize("config", [ATCConfig(r=0.5), ATCConfig.fast()])
@pytest.mark.parametrize(("name", "options"), PAG_PIPELINES)
def test_perturbed_attention_guidance_works_in_its_pipelines(components, name, options, config):
    pipe, prompt = pag_pipeline(name, components), embeddings(name)
    before = draw(pipe, prompt, pag_scale=3.0, **options)
    apply_patch(pipe, config)
    merged = draw(pipe, prompt, pag_scale=3.0, **options)
    assert np.isfinite(merged).all()
    assert not np.array_equal(merged, before)
    assert not np.array_equal(merged, draw(pipe, prompt, pag_scale=0.0, **options))
    assert {kept < layer.tokens for layer in summary(pipe).layers for kept in layer.kept_keys} == {True}
    assert np.array_equal(draw(apply_patch(pipe, r=1), prompt, pag_scale=3.0, **options), before)
    assert np.array_equal(draw(remove_patch(pipe), prompt, pag_scale=3.0, **options), before)


def test_perturbed_attention_guidance_without_classifier_free_guidance(components):
    pipe = apply_patch(pag_pipeline("StableDiffusionPAGPipeline", components), r=0.5)
    options: dict[str, Any] = {"height": 16, "width": 16, "guidance_scale": 0.0}
    assert not np.array_equal(
        draw(pipe, text(1), pag_scale=3.0, **options), draw(pipe, text(1), pag_scale=0.0, **options)
    )
