"""The pipelines people run, built from real diffusers classes."""

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor

from atc_diffusion import apply_patch, remove_patch, summary
from tests.conftest import UNET

PICTURE, MASK = torch.rand(1, 3, 16, 24), torch.ones(1, 1, 16, 24)
PIPELINES = [
    (StableDiffusionPipeline, {"height": 16, "width": 24}),
    (StableDiffusionImg2ImgPipeline, {"image": PICTURE, "strength": 0.9}),
    (StableDiffusionInpaintPipeline, {"image": PICTURE, "mask_image": MASK, "height": 16, "width": 24}),
]
PARTS: dict[str, Any] = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


def draw(pipe: Any, embedding: dict[str, Tensor], **options: Any) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe(**embedding, num_inference_steps=3, generator=generator, output_type="np", **options).images


def text(batch: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    names = ("prompt_embeds", "negative_prompt_embeds")
    return {name: torch.randn(batch, 5, 12, generator=generator) for name in names}


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("pipeline", "options"), PIPELINES)
def test_stable_diffusion(components, pipeline, options, batch):
    pipe = pipeline(**components, **PARTS)
    before = draw(pipe, text(batch), **options)
    assert apply_patch(pipe, r=0.5, refresh_every=1) is pipe
    merged = draw(pipe, text(batch), **options)
    assert merged.shape == before.shape
    assert not np.array_equal(merged, before)
    # A latent of 8 x 12; three scheduler steps, of which img2img at strength 0.9 runs two.
    steps = 2 if "strength" in options else 3
    assert {(x.tokens, x.kept, x.clusterings) for x in summary(pipe).layers} == {(96, (48,) * steps, steps)}
    remove_patch(pipe)
    assert np.array_equal(draw(pipe, text(batch), **options), before)


def test_sdxl_is_merged_at_its_finest_level_with_attention(components):
    unet = UNet2DConditionModel(
        **UNET
        | {
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2),
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": 6 * 4 + 10,
        }
    ).eval()
    pipe = StableDiffusionXLPipeline(
        **components | {"unet": unet}, text_encoder_2=None, tokenizer_2=None, add_watermarker=False
    )
    pooled = {"pooled_prompt_embeds": torch.ones(1, 10), "negative_pooled_prompt_embeds": torch.zeros(1, 10)}
    before = draw(pipe, text(1) | pooled, height=16, width=16)
    merged = draw(apply_patch(pipe, r=0.5, refresh_every=1), text(1) | pooled, height=16, width=16)
    assert not np.array_equal(merged, before)
    assert {(x.level, x.tokens, x.kept, x.clusterings) for x in summary(pipe).layers} == {(2, 16, (8, 8, 8), 3)}


def test_the_unet_inside_a_pipeline_may_be_compiled(components):
    pipe = StableDiffusionPipeline(**components, **PARTS)
    expected = draw(apply_patch(pipe, r=0.5), text(1), height=16, width=16)
    remove_patch(pipe)
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    apply_patch(pipe, r=0.5)
    assert np.allclose(draw(pipe, text(1), height=16, width=16), expected, atol=1e-4)


def test_offloading_keeps_working(components):
    pipe = StableDiffusionPipeline(**components, **PARTS)
    expected = draw(apply_patch(pipe, r=0.5), text(1), height=16, width=16)
    pipe.unet.enable_group_offload(
        onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), offload_type="leaf_level"
    )
    assert np.array_equal(draw(pipe, text(1), height=16, width=16), expected)
