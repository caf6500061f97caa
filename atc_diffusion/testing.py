"""Tiny networks of the model families: real diffusers classes with random weights, and inputs for two images.

`checks` and the tests share them.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from atc_diffusion.adapters.lookup import is_supported

UNET: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 12,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}
SDXL: dict[str, Any] = UNET | {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 6 * 4 + 10,
}
PIXART: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_layers": 2,
    "sample_size": 8,
    "cross_attention_dim": 16,
    "caption_channels": 12,
    "norm_num_groups": 1,
}
SD3: dict[str, Any] = {
    "sample_size": 16,
    "in_channels": 16,
    "num_layers": 3,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 12,
    "caption_projection_dim": 16,
    "pooled_projection_dim": 10,
    "pos_embed_max_size": 16,
}
SD35: dict[str, Any] = SD3 | {"qk_norm": "rms_norm", "dual_attention_layers": (0,)}
FLUX: dict[str, Any] = {
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 12,
    "pooled_projection_dim": 10,
    "axes_dims_rope": (2, 2, 4),
}
QWEN_IMAGE: dict[str, Any] = {
    "in_channels": 16,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 12,
    "axes_dims_rope": (2, 2, 4),
}
Z_IMAGE: dict[str, Any] = {
    "in_channels": 4,
    "dim": 16,
    "n_layers": 2,
    "n_refiner_layers": 1,
    "n_heads": 2,
    "n_kv_heads": 2,
    "cap_feat_dim": 12,
    "axes_dims": [2, 2, 4],
    "axes_lens": [256, 32, 32],
}


@dataclass(frozen=True)
class TinyNetwork:
    """How to make a network, what to call it with, and what of it merges.

    Attributes:
        build: makes the network.
        inputs: arguments for a batch of two images, by height and width of the latents.
        layers: how many self-attentions are merged by default.
        level: their level, as a downsampling factor.
        timestep: the argument that carries a timestep `[B]` of the scheduler.
        merges_queries: whether queries can be merged, too.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[int, int], dict[str, Any]]
    layers: int
    level: int
    timestep: Callable[[Tensor], dict[str, Tensor]] = lambda timestep: {"timestep": timestep}
    merges_queries: bool = True

    @property
    def half(self) -> dict[str, Any]:
        """Options of `apply_patch` that keep half of what can be merged."""
        return {"r": 0.5} if self.merges_queries else {"r": 1, "r_keys": 0.5}

    def make(self) -> nn.Module:
        """The network, for inference; weights that diffusers sets to zero would hide errors, so they are drawn."""
        network = self.build().eval().requires_grad_(False)
        for parameter in network.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.1)
        return network

    @torch.no_grad()
    def run(self, network: nn.Module, timestep: Any = 10, size: tuple[int, int] = (8, 12), **changes: Any) -> Tensor:
        """All outputs of one call, flattened and concatenated; the inputs are the same at every call."""
        inputs = self.inputs(*size) | self.timestep(torch.as_tensor(timestep).expand(2)) | changes
        return torch.cat([tensor.flatten() for tensor in _tensors(network(**inputs, return_dict=False))])


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
        return
    for part in output:
        yield from _tensors(part)


def draw(*shape: int) -> Tensor:
    """Gaussian noise that is the same for the same shape."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def unet_inputs(height: int, width: int) -> dict[str, Any]:
    return {"sample": draw(2, 4, height, width), "encoder_hidden_states": draw(2, 5, 12)}


def sdxl_inputs(height: int, width: int) -> dict[str, Any]:
    conditions = {"text_embeds": draw(2, 10), "time_ids": torch.ones(2, 6)}
    return unet_inputs(height, width) | {"added_cond_kwargs": conditions}


def pixart_inputs(height: int, width: int) -> dict[str, Any]:
    sizes = {"resolution": None, "aspect_ratio": None}
    return {
        "hidden_states": draw(2, 4, height, width),
        "encoder_hidden_states": draw(2, 5, 12),
        "encoder_attention_mask": torch.tensor([[1.0] * 5, [1.0] * 3 + [0.0] * 2]),
        "added_cond_kwargs": sizes,
    }


def sd3_inputs(height: int, width: int) -> dict[str, Any]:
    return {
        "hidden_states": draw(2, 16, height, width),
        "encoder_hidden_states": draw(2, 5, 12),
        "pooled_projections": draw(2, 10),
    }


def flux_inputs(height: int, width: int) -> dict[str, Any]:
    """Latents that are packed two by two; text tokens have no position."""
    return {
        "hidden_states": draw(2, height * width // 4, 16),
        "encoder_hidden_states": draw(2, 5, 12),
        "pooled_projections": draw(2, 10),
        "img_ids": flux_ids(height // 2, width // 2),
        "txt_ids": torch.zeros(5, 3),
    }


def flux_ids(height: int, width: int, image: int = 0) -> Tensor:
    """Image, row and column of every token, `[N, 3]`."""
    return torch.cartesian_prod(torch.tensor([image]), torch.arange(height), torch.arange(width)).float()


def qwen_image_inputs(height: int, width: int) -> dict[str, Any]:
    return {
        "hidden_states": draw(2, height * width // 4, 16),
        "encoder_hidden_states": draw(2, 5, 12),
        "encoder_hidden_states_mask": torch.tensor([[1] * 5, [1] * 3 + [0] * 2]),
        "img_shapes": [[(1, height // 2, width // 2)]] * 2,
    }


def z_image_inputs(height: int, width: int) -> dict[str, Any]:
    """Texts of 5 and of 40 tokens; the first is padded and masked."""
    return {"x": list(draw(2, 4, 1, height, width)), "cap_feats": [draw(5, 12), draw(40, 12)]}


def noise_level(timestep: Tensor) -> dict[str, Tensor]:
    return {"timestep": timestep / 1000}


def progress(timestep: Tensor) -> dict[str, Tensor]:
    return {"t": (1000 - timestep) / 1000}


KEYS_ONLY: dict[str, Any] = {"level": 2, "timestep": noise_level, "merges_queries": False}
_ALL = {
    "sd15": TinyNetwork(lambda: diffusers.UNet2DConditionModel(**UNET), unet_inputs, layers=3, level=1),
    "sdxl": TinyNetwork(lambda: diffusers.UNet2DConditionModel(**SDXL), sdxl_inputs, layers=8, level=2),
    "pixart": TinyNetwork(lambda: diffusers.PixArtTransformer2DModel(**PIXART), pixart_inputs, layers=2, level=2),
    "sd3": TinyNetwork(lambda: diffusers.SD3Transformer2DModel(**SD3), sd3_inputs, layers=3, level=2),
    "sd35": TinyNetwork(lambda: diffusers.SD3Transformer2DModel(**SD35), sd3_inputs, layers=4, level=2),
    "flux": TinyNetwork(lambda: diffusers.FluxTransformer2DModel(**FLUX), flux_inputs, layers=4, **KEYS_ONLY),
    "qwen_image": TinyNetwork(
        lambda: diffusers.QwenImageTransformer2DModel(**QWEN_IMAGE), qwen_image_inputs, layers=2, **KEYS_ONLY
    ),
    "z_image": TinyNetwork(
        lambda: diffusers.ZImageTransformer2DModel(**Z_IMAGE),
        z_image_inputs,
        layers=2,
        **KEYS_ONLY | {"timestep": progress},
    ),
}
TINY_NETWORKS = {name: network for name, network in _ALL.items() if is_supported(name)}
