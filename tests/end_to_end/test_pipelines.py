"""The pipelines people run, built from real diffusers classes."""

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AnimateDiffPipeline,
    AutoencoderKL,
    ControlNetModel,
    ControlNetXSAdapter,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    MotionAdapter,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    SD3ControlNetModel,
    StableDiffusion3ControlNetInpaintingPipeline,
    StableDiffusion3ControlNetPipeline,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3InpaintPipeline,
    StableDiffusion3PAGPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionControlNetInpaintPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionControlNetXSPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from peft import LoraConfig, get_peft_model_state_dict
from torch import Tensor

from atc_diffusion import apply_patch, remove_patch, summary
from atc_diffusion.testing import SDXL, UNET
from tests.helpers.drawing import MASK, PARTS, PICTURE, VAE, draw, text
from tests.helpers.families import CONDITION, FAMILIES, SD3_CONTROLNET

PIPELINES = [
    (StableDiffusionPipeline, {"height": 16, "width": 24}),
    (StableDiffusionImg2ImgPipeline, {"image": PICTURE, "strength": 0.9}),
    (StableDiffusionInpaintPipeline, {"image": PICTURE, "mask_image": MASK, "height": 16, "width": 24}),
]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("pipeline", "options"), PIPELINES)
def test_stable_diffusion(components, pipeline, options, batch):
    pipe = pipeline(**components, **PARTS)
    before = draw(pipe, text(batch), **options)
    assert apply_patch(pipe, r=0.5, recluster_threshold=0) is pipe
    merged = draw(pipe, text(batch), **options)
    assert merged.shape == before.shape
    assert not np.array_equal(merged, before)
    # A latent of 8 x 12; three scheduler steps, of which img2img at strength 0.9 runs two.
    steps = 2 if "strength" in options else 3
    assert {(x.tokens, x.kept, x.clusterings) for x in summary(pipe).layers} == {(96, (48,) * steps, steps)}
    remove_patch(pipe)
    assert np.array_equal(draw(pipe, text(batch), **options), before)


POOLED = {"pooled_prompt_embeds": torch.ones(1, 10), "negative_pooled_prompt_embeds": torch.zeros(1, 10)}
NO_SECOND_TEXT: dict[str, Any] = {"text_encoder_2": None, "tokenizer_2": None, "add_watermarker": False}


def sdxl(pipeline: Any, components: dict[str, Any], **parts: Any) -> Any:
    unet = FAMILIES["sdxl"].make()
    return pipeline(**components | {"unet": unet}, **NO_SECOND_TEXT, **parts)


def test_sdxl_is_merged_at_its_finest_level_with_attention(components):
    pipe = sdxl(StableDiffusionXLPipeline, components)
    before = draw(pipe, text(1) | POOLED, height=16, width=16)
    merged = draw(apply_patch(pipe, r=0.5, recluster_threshold=0), text(1) | POOLED, height=16, width=16)
    assert not np.array_equal(merged, before)
    assert {(x.level, x.tokens, x.kept, x.clusterings) for x in summary(pipe).layers} == {(2, 16, (8, 8, 8), 3)}


def networks(pipe: Any) -> list[str]:
    """The patched networks, each of which was merged and clustered in the last run."""
    layers = summary(pipe).layers
    assert all(layer.kept and layer.clusterings for layer in layers)
    return list(dict.fromkeys(layer.network for layer in layers))


def check_patch(pipe: Any, embedding: dict[str, Tensor], expected: list[str], **options: Any) -> None:
    """Merging runs in the `expected` networks; removal restores the picture to the bit."""
    before = draw(pipe, embedding, **options)
    merged = draw(apply_patch(pipe, r=0.5), embedding, **options)
    assert networks(pipe) == expected
    assert not np.array_equal(merged, before)
    assert np.array_equal(draw(remove_patch(pipe), embedding, **options), before)


CONTROLNET_PIPELINES = [
    (StableDiffusionControlNetPipeline, {"image": PICTURE}),
    (StableDiffusionControlNetImg2ImgPipeline, {"image": PICTURE, "control_image": PICTURE}),
    (StableDiffusionControlNetInpaintPipeline, {"image": PICTURE, "mask_image": MASK, "control_image": PICTURE}),
]


@pytest.mark.parametrize(("pipeline", "options"), CONTROLNET_PIPELINES)
def test_a_controlnets_own_attention_is_merged(components, pipeline, options):
    pipe = pipeline(**components, **PARTS, controlnet=FAMILIES["controlnet"].make())
    check_patch(pipe, text(1), ["unet", "controlnet"], **options)


def test_all_of_several_controlnets_are_merged(components):
    several = [FAMILIES["controlnet"].make() for _ in range(2)]
    pipe = StableDiffusionControlNetPipeline(**components, **PARTS, controlnet=several)
    check_patch(pipe, text(1), ["unet", "controlnet.nets.0", "controlnet.nets.1"], image=[PICTURE, PICTURE])


def test_sdxl_controlnet(components):
    controlnet = ControlNetModel.from_unet(UNet2DConditionModel(**SDXL), **CONDITION).eval()
    pipe = sdxl(StableDiffusionXLControlNetPipeline, components, controlnet=controlnet)
    controlnet.controlnet_mid_block.weight.data.fill_(0.1)
    check_patch(pipe, text(1) | POOLED, ["unet", "controlnet"], image=PICTURE)


def test_controlnet_xs_is_one_network(components):
    """The adapter that the pipeline keeps beside it is never called, and so never patched."""
    unet = UNet2DConditionModel(**UNET | {"layers_per_block": 2, "use_linear_projection": True}).eval()
    adapter = ControlNetXSAdapter.from_unet(unet, size_ratio=1, **CONDITION).eval()
    pipe = StableDiffusionControlNetXSPipeline(**components | {"unet": unet}, **PARTS, controlnet=adapter)
    check_patch(pipe, text(1), ["unet"], image=PICTURE)
    apply_patch(pipe)
    assert not any(module._forward_hooks for module in pipe.controlnet.modules())


def test_a_patched_unet_does_not_patch_the_animatediff_that_is_made_of_it(components):
    blocks = {"block_out_channels": (16, 32), "motion_layers_per_block": 1, "motion_num_attention_heads": 2}
    adapter = MotionAdapter(**blocks, motion_norm_num_groups=4).eval()
    apply_patch(components["unet"], r=0.5)
    pipe = AnimateDiffPipeline(**components, motion_adapter=adapter)
    with pytest.raises(ValueError, match="this AnimateDiffPipeline is not patched; call apply_patch first"):
        summary(pipe)
    film = {"num_frames": 2, "num_inference_steps": 2, "height": 16, "width": 16, "output_type": "latent"}
    pipe.set_progress_bar_config(disable=True)
    apply_patch(pipe, r=0.5)(**text(1), **film)
    assert {(layer.network, layer.tokens, layer.kept) for layer in summary(pipe).layers} == {("unet", 64, (32, 32))}


@pytest.mark.parametrize("pipeline", [PixArtAlphaPipeline, PixArtSigmaPipeline])
def test_pixart(components, pipeline):
    parts = {name: components[name] for name in ("vae", "text_encoder", "tokenizer")}
    transformer, scheduler = FAMILIES["pixart"].make(), DPMSolverMultistepScheduler()
    pipe = pipeline(**parts, transformer=transformer, scheduler=scheduler)
    masks = {name: torch.ones(1, 5) for name in ("prompt_attention_mask", "negative_prompt_attention_mask")}
    options: dict[str, Any] = {"height": 16, "width": 24, "use_resolution_binning": False, "negative_prompt": None}
    check_patch(pipe, text(1) | masks, ["transformer"], **options)


def sd3(pipeline: Any, **parts: Any) -> Any:
    texts = {f"{part}{i}": None for part in ("text_encoder", "tokenizer") for i in ("", "_2", "_3")}
    vae = AutoencoderKL(**VAE | {"latent_channels": 16, "shift_factor": 0.1}).eval()
    transformer, scheduler = FAMILIES["sd35"].make(), FlowMatchEulerDiscreteScheduler()
    return pipeline(vae=vae, transformer=transformer, scheduler=scheduler, **texts, **parts)


SD3_PIPELINES = [
    (StableDiffusion3Pipeline, {"height": 16, "width": 24}),
    (StableDiffusion3Img2ImgPipeline, {"image": PICTURE, "height": 16, "width": 24, "strength": 0.9}),
    (StableDiffusion3InpaintPipeline, {"image": PICTURE, "mask_image": MASK, "height": 16, "width": 24}),
]


@pytest.mark.parametrize(("pipeline", "options"), SD3_PIPELINES)
def test_stable_diffusion_3(pipeline, options):
    check_patch(sd3(pipeline), text(1) | POOLED, ["transformer"], **options)


def test_skip_layer_guidance():
    options: dict[str, Any] = {"height": 16, "width": 24, "skip_guidance_layers": [1], "skip_layer_guidance_stop": 1.0}
    check_patch(sd3(StableDiffusion3Pipeline), text(1) | POOLED, ["transformer"], **options)


@pytest.mark.parametrize("name", ["sd3_controlnet", "sd35_large_controlnet"])
def test_stable_diffusion_3_controlnet(name):
    pipe = sd3(StableDiffusion3ControlNetPipeline, controlnet=FAMILIES[name].make())
    check_patch(pipe, text(1) | POOLED, ["transformer", "controlnet"], control_image=PICTURE, height=16, width=24)


def test_stable_diffusion_3_controlnet_inpainting():
    """Its condition has a channel for the mask."""
    controlnet = SD3ControlNetModel(**SD3_CONTROLNET, extra_conditioning_channels=1).eval()
    controlnet.controlnet_blocks[1].weight.data.fill_(0.1)
    pipe = sd3(StableDiffusion3ControlNetInpaintingPipeline, controlnet=controlnet)
    options: dict[str, Any] = {"control_image": PICTURE, "control_mask": MASK, "height": 16, "width": 24}
    check_patch(pipe, text(1) | POOLED, ["transformer", "controlnet"], **options)


def test_loras_of_stable_diffusion_3_are_loaded_and_saved(tmp_path):
    pipe = sd3(StableDiffusion3Pipeline)
    options: dict[str, Any] = {"height": 16, "width": 24}
    apply_patch(pipe, r=0.5)
    without = draw(pipe, text(1) | POOLED, **options)
    pipe.transformer.add_adapter(
        LoraConfig(r=2, lora_alpha=2, init_lora_weights=False, target_modules=["to_q", "to_v"])
    )
    expected = draw(pipe, text(1) | POOLED, **options)
    assert not np.array_equal(expected, without)
    weights = get_peft_model_state_dict(pipe.transformer)
    StableDiffusion3Pipeline.save_lora_weights(tmp_path, transformer_lora_layers=weights)
    pipe.transformer.delete_adapters("default")
    pipe.load_lora_weights(tmp_path)
    assert np.array_equal(draw(pipe, text(1) | POOLED, **options), expected)
    assert networks(pipe) == ["transformer"]


def test_perturbed_attention_guidance_of_stable_diffusion_3_stays_unmerged():
    """Its processors come with the first call, and ignore what merging needs."""
    pipe = sd3(StableDiffusion3PAGPipeline, pag_applied_layers="transformer_blocks.1")
    apply_patch(pipe, r=0.5)
    with pytest.warns(UserWarning, match=r"transformer_blocks.1.attn stays unmerged: it has a .*PAG"):
        draw(pipe, text(1) | POOLED, height=16, width=24, pag_scale=3.0)


def test_offloading_keeps_working(components):
    pipe = StableDiffusionPipeline(**components, **PARTS)
    expected = draw(apply_patch(pipe, r=0.5), text(1), height=16, width=16)
    pipe.unet.enable_group_offload(
        onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), offload_type="leaf_level"
    )
    assert np.array_equal(draw(pipe, text(1), height=16, width=16), expected)
