"""One network of every supported family: real diffusers classes at tiny size, with random weights, and their inputs."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    ControlNetModel,
    ControlNetUnionModel,
    ControlNetXSAdapter,
    FluxControlNetModel,
    FluxTransformer2DModel,
    MotionAdapter,
    MultiControlNetModel,
    PixArtTransformer2DModel,
    QwenImageControlNetModel,
    QwenImageTransformer2DModel,
    SD3ControlNetModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    UNetControlNetXSModel,
    UNetMotionModel,
    ZImageTransformer2DModel,
)
from torch import Tensor, nn

from tests.conftest import UNET

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
SD3_CONTROLNET: dict[str, Any] = SD3 | {"num_layers": 2}
SD35_LARGE_CONTROLNET: dict[str, Any] = SD3_CONTROLNET | {
    "joint_attention_dim": None,
    "use_pos_embed": False,
}
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
CONDITION: dict[str, Any] = {"conditioning_embedding_out_channels": (4, 8)}


@dataclass(frozen=True)
class Family:
    """How to make a network and what to call it with.

    Attributes:
        build: makes the network; weights that diffusers sets to zero are drawn by `make`.
        inputs: arguments for a batch of two pictures with latents of a height and a width.
        layers: how many self-attentions are merged.
        level: at which level.
        timestep: the argument that tells a timestep `[B]` of the scheduler, by its name.
        merges_queries: whether it can merge more than keys.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[int, int], dict[str, Any]]
    layers: int
    level: int
    timestep: Callable[[Tensor], dict[str, Tensor]] = lambda timestep: {"timestep": timestep}
    merges_queries: bool = True

    @property
    def half(self) -> dict[str, Any]:
        """Shares that keep half of what can merge."""
        return {"r": 0.5} if self.merges_queries else {"r": 1, "r_keys": 0.5}

    def make(self) -> nn.Module:
        network = self.build().eval().requires_grad_(False)
        for parameter in network.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.1)
        return network

    @torch.no_grad()
    def run(self, network: nn.Module, timestep: Any = 10, size: tuple[int, int] = (8, 12), **changes: Any) -> Tensor:
        """All outputs of one call, in a row; the input is the same at every call."""
        inputs = self.inputs(*size) | self.timestep(torch.as_tensor(timestep).expand(2)) | changes
        return torch.cat([tensor.flatten() for tensor in _tensors(network(**inputs, return_dict=False))])


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
        return
    for part in output:
        yield from _tensors(part)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def unet_inputs(height: int, width: int) -> dict[str, Any]:
    return {"sample": draw(2, 4, height, width), "encoder_hidden_states": draw(2, 5, 12)}


def sdxl_inputs(height: int, width: int) -> dict[str, Any]:
    conditions = {"text_embeds": draw(2, 10), "time_ids": torch.ones(2, 6)}
    return unet_inputs(height, width) | {"added_cond_kwargs": conditions}


def controlnet_inputs(height: int, width: int) -> dict[str, Any]:
    return unet_inputs(height, width) | {"controlnet_cond": draw(2, 3, 2 * height, 2 * width)}


def multi_controlnet_inputs(height: int, width: int) -> dict[str, Any]:
    inputs = controlnet_inputs(height, width)
    return inputs | {"controlnet_cond": [inputs["controlnet_cond"]] * 2, "conditioning_scale": [1.0, 0.5]}


def controlnet_union_inputs(height: int, width: int) -> dict[str, Any]:
    inputs = controlnet_inputs(height, width)
    control_type = torch.tensor([[1.0, 0.0]] * 2)
    return inputs | {
        "controlnet_cond": [inputs["controlnet_cond"]],
        "control_type": control_type,
        "control_type_idx": [0],
    }


def motion_inputs(height: int, width: int) -> dict[str, Any]:
    """Two films of three frames, and a text for each frame."""
    text = unet_inputs(height, width)["encoder_hidden_states"].repeat_interleave(3, dim=0)
    return {"sample": draw(2, 4, 3, height, width), "encoder_hidden_states": text}


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


def sd3_controlnet_inputs(height: int, width: int) -> dict[str, Any]:
    return sd3_inputs(height, width) | {"controlnet_cond": draw(2, 16, height, width)}


def sd35_large_controlnet_inputs(height: int, width: int) -> dict[str, Any]:
    """The transformer's own patches, and no text."""
    return {
        "hidden_states": draw(2, height * width // 4, 16),
        "pooled_projections": draw(2, 10),
        "controlnet_cond": draw(2, 16, height, width),
    }


def flux_inputs(height: int, width: int) -> dict[str, Any]:
    """Latents that are packed two by two; no text's tokens are on the grid."""
    return {
        "hidden_states": draw(2, height * width // 4, 16),
        "encoder_hidden_states": draw(2, 5, 12),
        "pooled_projections": draw(2, 10),
        "img_ids": flux_ids(height // 2, width // 2),
        "txt_ids": torch.zeros(5, 3),
    }


def flux_ids(height: int, width: int, picture: int = 0) -> Tensor:
    """Which picture, row and column every token is of, `[N, 3]`."""
    return torch.cartesian_prod(torch.tensor([picture]), torch.arange(height), torch.arange(width)).float()


def kontext_inputs(height: int, width: int) -> dict[str, Any]:
    """A reference picture of another shape follows the picture."""
    inputs = flux_inputs(height, width)
    ids = torch.cat([inputs["img_ids"], flux_ids(3, 5, picture=1)])
    return inputs | {"hidden_states": torch.cat([inputs["hidden_states"], draw(2, 15, 16)], dim=1), "img_ids": ids}


def flux_controlnet_inputs(height: int, width: int) -> dict[str, Any]:
    return flux_inputs(height, width) | {"controlnet_cond": draw(2, height * width // 4, 16)}


def qwen_image_inputs(height: int, width: int) -> dict[str, Any]:
    return {
        "hidden_states": draw(2, height * width // 4, 16),
        "encoder_hidden_states": draw(2, 5, 12),
        "encoder_hidden_states_mask": torch.tensor([[1] * 5, [1] * 3 + [0] * 2]),
        "img_shapes": [[(1, height // 2, width // 2)]] * 2,
    }


def qwen_image_edit_inputs(height: int, width: int) -> dict[str, Any]:
    """A picture to edit of another shape follows the picture."""
    inputs = qwen_image_inputs(height, width)
    shapes = [[*inputs["img_shapes"][0], (1, 3, 5)]] * 2
    return inputs | {
        "hidden_states": torch.cat([inputs["hidden_states"], draw(2, 15, 16)], dim=1),
        "img_shapes": shapes,
    }


def qwen_image_controlnet_inputs(height: int, width: int) -> dict[str, Any]:
    return qwen_image_inputs(height, width) | {"controlnet_cond": draw(2, height * width // 4, 16)}


def z_image_inputs(height: int, width: int) -> dict[str, Any]:
    """Texts of five and of forty tokens: the first is padded, and masked behind that."""
    return {"x": list(draw(2, 4, 1, height, width)), "cap_feats": [draw(5, 12), draw(40, 12)]}


def per_mille(timestep: Tensor) -> dict[str, Tensor]:
    return {"timestep": timestep / 1000}


def risen(timestep: Tensor) -> dict[str, Tensor]:
    return {"t": (1000 - timestep) / 1000}


def unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(**UNET)


def controlnet() -> ControlNetModel:
    return ControlNetModel.from_unet(unet(), **CONDITION)


def controlnet_union() -> ControlNetUnionModel:
    blocks = {key: UNET[key] for key in ("block_out_channels", "layers_per_block", "down_block_types")}
    widths = {key: UNET[key] for key in ("cross_attention_dim", "attention_head_dim", "norm_num_groups")}
    types = {"num_control_type": 2, "addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 8}
    transformer = {"num_trans_channel": 16, "num_trans_head": 2, "num_proj_channel": 16}
    return ControlNetUnionModel(**blocks, **widths, **CONDITION, **types, **transformer)


def controlnet_xs() -> UNetControlNetXSModel:
    base = UNet2DConditionModel(**UNET | {"layers_per_block": 2, "use_linear_projection": True})
    return UNetControlNetXSModel.from_unet(base, ControlNetXSAdapter.from_unet(base, size_ratio=1, **CONDITION))


def animatediff() -> UNetMotionModel:
    blocks = {"block_out_channels": (16, 32), "motion_layers_per_block": 1, "motion_num_attention_heads": 2}
    adapter = MotionAdapter(**blocks, motion_norm_num_groups=4)
    return UNetMotionModel.from_unet2d(unet(), adapter)


KEYS: dict[str, Any] = {"level": 2, "timestep": per_mille, "merges_queries": False}
FAMILIES = {
    "sd15": Family(unet, unet_inputs, layers=3, level=1),
    "sdxl": Family(lambda: UNet2DConditionModel(**SDXL), sdxl_inputs, layers=8, level=2),
    "controlnet": Family(controlnet, controlnet_inputs, layers=1, level=1),
    "multi_controlnet": Family(
        lambda: MultiControlNetModel([controlnet(), controlnet()]), multi_controlnet_inputs, layers=2, level=1
    ),
    "controlnet_union": Family(controlnet_union, controlnet_union_inputs, layers=1, level=1),
    "controlnet_xs": Family(controlnet_xs, controlnet_inputs, layers=7, level=1),
    "animatediff": Family(animatediff, motion_inputs, layers=3, level=1),
    "pixart": Family(lambda: PixArtTransformer2DModel(**PIXART), pixart_inputs, layers=2, level=2),
    "sd3": Family(lambda: SD3Transformer2DModel(**SD3), sd3_inputs, layers=3, level=2),
    "sd35": Family(lambda: SD3Transformer2DModel(**SD35), sd3_inputs, layers=4, level=2),
    "sd3_controlnet": Family(lambda: SD3ControlNetModel(**SD3_CONTROLNET), sd3_controlnet_inputs, layers=2, level=2),
    "sd35_large_controlnet": Family(
        lambda: SD3ControlNetModel(**SD35_LARGE_CONTROLNET), sd35_large_controlnet_inputs, layers=2, level=2
    ),
    "flux": Family(lambda: FluxTransformer2DModel(**FLUX), flux_inputs, layers=4, **KEYS),
    "flux_kontext": Family(lambda: FluxTransformer2DModel(**FLUX), kontext_inputs, layers=4, **KEYS),
    "flux_controlnet": Family(lambda: FluxControlNetModel(**FLUX), flux_controlnet_inputs, layers=4, **KEYS),
    "qwen_image": Family(lambda: QwenImageTransformer2DModel(**QWEN_IMAGE), qwen_image_inputs, layers=2, **KEYS),
    "qwen_image_edit": Family(
        lambda: QwenImageTransformer2DModel(**QWEN_IMAGE), qwen_image_edit_inputs, layers=2, **KEYS
    ),
    "qwen_image_controlnet": Family(
        lambda: QwenImageControlNetModel(**QWEN_IMAGE), qwen_image_controlnet_inputs, layers=2, **KEYS
    ),
    "z_image": Family(
        lambda: ZImageTransformer2DModel(**Z_IMAGE), z_image_inputs, layers=2, **KEYS | {"timestep": risen}
    ),
}
ROTARY = [name for name, family in FAMILIES.items() if not family.merges_queries]
