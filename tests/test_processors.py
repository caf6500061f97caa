"""Attention processors: the known ones work, before and after patching; any other is refused before the first step."""

from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from diffusers.models.attention_processor import (
    AttnProcessor,
    AttnProcessor2_0,
    CustomDiffusionAttnProcessor,
    CustomDiffusionAttnProcessor2_0,
    PAGCFGIdentitySelfAttnProcessor2_0,
    PAGIdentitySelfAttnProcessor2_0,
    SlicedAttnProcessor,
)
from diffusers.pipelines.deprecated.stable_diffusion_attend_and_excite import (
    pipeline_stable_diffusion_attend_and_excite as attend_and_excite,
)
from diffusers.pipelines.deprecated.text_to_video_synthesis import pipeline_text_to_video_zero as text_to_video_zero
from torch import Tensor, nn

from atc_diffusion import apply_patch, remove_patch, summary
from tests.conftest import UNET
from tests.test_patch import run
from tests.test_pipelines import MASK, PARTS, PICTURE, draw, text

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
    message = f"{LAYER} has a FusedAttnProcessor2_0: keys merged apart from queries need .* unfuse_qkv_projections()"
    with pytest.raises(ValueError, match=message):
        run(unet)
    with pytest.raises(ValueError, match=message):
        apply_patch(unet, r_keys=0.3)
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
def test_any_other_processor_is_refused_before_the_first_step(unet, processor):
    message = f"{LAYER} has a {type(processor).__name__}: that processor is not known to work with merged tokens"
    ordinary = attention(unet).processor
    attention(unet).set_processor(processor)
    before = [(type(module), len(module._forward_pre_hooks)) for module in unet.modules()]
    with pytest.raises(ValueError, match=message):
        apply_patch(unet)
    assert [(type(module), len(module._forward_pre_hooks)) for module in unet.modules()] == before
    attention(unet).set_processor(ordinary)
    apply_patch(unet)
    attention(unet).set_processor(processor)
    reached: list[nn.Module] = []
    unet.conv_in.register_forward_pre_hook(lambda module, args: reached.append(module))
    with pytest.raises(ValueError, match=message):
        run(unet)
    assert not reached


def test_other_processors_may_be_where_nothing_is_merged(unet):
    expected = run(apply_patch(unet))
    processor = OTHERS[2]
    unet.mid_block.attentions[0].transformer_blocks[0].attn1.set_processor(processor)
    assert torch.allclose(run(unet), expected, atol=1e-5)
    with pytest.raises(ValueError, match="AttendExciteAttnProcessor"):
        apply_patch(unet, max_downsample=2)


def test_a_bank_of_keys_that_attention_is_given_is_used_as_it_is(unet):
    """Reference-only control gives attn1 `encoder_hidden_states`: the picture's tokens and those of a reference."""
    tokens, bank = torch.randn(1, 16, 16), torch.randn(1, 40, 16)
    repeated = tokens[:, :4].repeat_interleave(4, dim=1)
    expected = attention(unet)(repeated, encoder_hidden_states=bank)
    for shares in SHARES:
        apply_patch(unet, **shares)
        assert torch.allclose(attention(unet)(repeated, encoder_hidden_states=bank), expected, atol=1e-6)
        assert not torch.allclose(attention(unet)(repeated), expected, atol=1e-3)


PERTURBED = [(PAGIdentitySelfAttnProcessor2_0(), 2), (PAGCFGIdentitySelfAttnProcessor2_0(), 3)]


@pytest.mark.parametrize("proportional_attention", [True, False])
@pytest.mark.parametrize(("processor", "parts"), PERTURBED)
def test_merging_with_perturbed_attention_equals_merging_each_part(unet, processor, parts, proportional_attention):
    attn = attention(unet)
    tokens = torch.randn(2 * parts, 16, 16)
    kept, perturbed = tokens.split([2 * parts - 2, 2])
    apply_patch(unet, r=0.25, proportional_attention=proportional_attention)
    expected = attn(kept)
    attn.set_processor(processor)
    output = attn(tokens)
    assert torch.allclose(output[:-2], expected, atol=1e-6)
    assert all(len(item.unique(dim=0)) == 4 for item in output[-2:])
    # Of equal tokens the mean is the token: the identity attention of a perturbed part is exact there.
    equal = torch.cat([kept, perturbed[:, :1].expand(-1, 16, -1)])
    remove_patch(unet)
    exact = attn(equal)[-2:]
    apply_patch(unet, r=0.25)
    assert torch.allclose(attn(equal)[-2:], exact, atol=1e-6)


def test_perturbed_attention_is_refused_with_keys_of_their_own(unet):
    attention(unet).set_processor(PAGCFGIdentitySelfAttnProcessor2_0())
    with pytest.raises(
        ValueError, match="perturbed-attention guidance needs as many keys as queries; leave r_keys out"
    ):
        apply_patch(unet, r_keys=0.2)


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


@pytest.mark.parametrize(("name", "options"), PAG_PIPELINES)
def test_perturbed_attention_guidance_works_in_its_pipelines(components, name, options):
    pipe, prompt = pag_pipeline(name, components), embeddings(name)
    before = draw(pipe, prompt, pag_scale=3.0, **options)
    apply_patch(pipe, r=0.5)
    merged = draw(pipe, prompt, pag_scale=3.0, **options)
    assert np.isfinite(merged).all()
    assert not np.array_equal(merged, before)
    assert not np.array_equal(merged, draw(pipe, prompt, pag_scale=0.0, **options))
    assert {kept < layer.tokens for layer in summary(pipe).layers for kept in layer.kept} == {True}
    assert np.array_equal(draw(apply_patch(pipe, r=1), prompt, pag_scale=3.0, **options), before)
    assert np.array_equal(draw(remove_patch(pipe), prompt, pag_scale=3.0, **options), before)


def test_perturbed_attention_guidance_without_classifier_free_guidance(components):
    pipe = apply_patch(pag_pipeline("StableDiffusionPAGPipeline", components), r=0.5)
    options: dict[str, Any] = {"height": 16, "width": 16, "guidance_scale": 0.0}
    assert not np.array_equal(
        draw(pipe, text(1), pag_scale=3.0, **options), draw(pipe, text(1), pag_scale=0.0, **options)
    )
