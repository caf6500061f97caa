"""Runs of pipelines made of tiny parts, whose text is given as an embedding."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

VAE: dict[str, Any] = {
    "block_out_channels": (8, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "latent_channels": 4,
    "norm_num_groups": 4,
    "sample_size": 16,
}
PICTURE, MASK = torch.rand(1, 3, 16, 24), torch.ones(1, 1, 16, 24)
PARTS: dict[str, Any] = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


def draw(pipe: Any, embedding: dict[str, Tensor], **options: Any) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(0)  # some pipelines draw the encoded condition without the generator
    generator = torch.Generator().manual_seed(0)
    return pipe(**embedding, num_inference_steps=3, generator=generator, output_type="np", **options).images


def text(batch: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    names = ("prompt_embeds", "negative_prompt_embeds")
    return {name: torch.randn(batch, 5, 12, generator=generator) for name in names}
