"""One tiny network of every supported family: those that the package's own check uses, ControlNets and variants."""

from typing import Any

import diffusers
import torch
from diffusers import (
    ControlNetModel,
    ControlNetUnionModel,
    ControlNetXSAdapter,
    FluxControlNetModel,
    FluxTransformer2DModel,
    MotionAdapter,
    MultiControlNetModel,
    SD3ControlNetModel,
    UNet2DConditionModel,
    UNetControlNetXSModel,
    UNetMotionModel,
)

from atc_diffusion.adapters.lookup import is_supported
from atc_diffusion.testing import (
    FLUX,
    KEYS_ONLY,
    QWEN_IMAGE,
    SD3,
    TINY_NETWORKS,
    UNET,
    TinyNetwork,
    draw,
    flux_ids,
    flux_inputs,
    qwen_image_inputs,
    sd3_inputs,
    unet_inputs,
)

SD3_CONTROLNET: dict[str, Any] = SD3 | {"num_layers": 2}
SD35_LARGE_CONTROLNET: dict[str, Any] = SD3_CONTROLNET | {
    "joint_attention_dim": None,
    "use_pos_embed": False,
}
CONDITION: dict[str, Any] = {"conditioning_embedding_out_channels": (4, 8)}


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
    """Two videos of three frames, and a text for each frame."""
    text = unet_inputs(height, width)["encoder_hidden_states"].repeat_interleave(3, dim=0)
    return {"sample": draw(2, 4, 3, height, width), "encoder_hidden_states": text}


def sd3_controlnet_inputs(height: int, width: int) -> dict[str, Any]:
    return sd3_inputs(height, width) | {"controlnet_cond": draw(2, 16, height, width)}


def sd35_large_controlnet_inputs(height: int, width: int) -> dict[str, Any]:
    """The transformer's own patches, and no text."""
    return {
        "hidden_states": draw(2, height * width // 4, 16),
        "pooled_projections": draw(2, 10),
        "controlnet_cond": draw(2, 16, height, width),
    }


def kontext_inputs(height: int, width: int) -> dict[str, Any]:
    """A reference image of another shape follows the image."""
    inputs = flux_inputs(height, width)
    ids = torch.cat([inputs["img_ids"], flux_ids(3, 5, image=1)])
    return inputs | {"hidden_states": torch.cat([inputs["hidden_states"], draw(2, 15, 16)], dim=1), "img_ids": ids}


def flux_controlnet_inputs(height: int, width: int) -> dict[str, Any]:
    return flux_inputs(height, width) | {"controlnet_cond": draw(2, height * width // 4, 16)}


def qwen_image_edit_inputs(height: int, width: int) -> dict[str, Any]:
    """An image to edit of another shape follows the image."""
    inputs = qwen_image_inputs(height, width)
    shapes = [[*inputs["img_shapes"][0], (1, 3, 5)]] * 2
    return inputs | {
        "hidden_states": torch.cat([inputs["hidden_states"], draw(2, 15, 16)], dim=1),
        "img_shapes": shapes,
    }


def qwen_image_controlnet_inputs(height: int, width: int) -> dict[str, Any]:
    return qwen_image_inputs(height, width) | {"controlnet_cond": draw(2, height * width // 4, 16)}


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


_ALL = TINY_NETWORKS | {
    "controlnet": TinyNetwork(controlnet, controlnet_inputs, layers=1, level=1),
    "multi_controlnet": TinyNetwork(
        lambda: MultiControlNetModel([controlnet(), controlnet()]), multi_controlnet_inputs, layers=2, level=1
    ),
    "controlnet_union": TinyNetwork(controlnet_union, controlnet_union_inputs, layers=1, level=1),
    "controlnet_xs": TinyNetwork(controlnet_xs, controlnet_inputs, layers=7, level=1),
    "animatediff": TinyNetwork(animatediff, motion_inputs, layers=3, level=1),
    "sd3_controlnet": TinyNetwork(
        lambda: SD3ControlNetModel(**SD3_CONTROLNET), sd3_controlnet_inputs, layers=2, level=2
    ),
    "sd35_large_controlnet": TinyNetwork(
        lambda: SD3ControlNetModel(**SD35_LARGE_CONTROLNET), sd35_large_controlnet_inputs, layers=2, level=2
    ),
    "flux_kontext": TinyNetwork(lambda: FluxTransformer2DModel(**FLUX), kontext_inputs, layers=4, **KEYS_ONLY),
    "flux_controlnet": TinyNetwork(lambda: FluxControlNetModel(**FLUX), flux_controlnet_inputs, layers=4, **KEYS_ONLY),
    "qwen_image_edit": TinyNetwork(
        lambda: diffusers.QwenImageTransformer2DModel(**QWEN_IMAGE), qwen_image_edit_inputs, layers=2, **KEYS_ONLY
    ),
    "qwen_image_controlnet": TinyNetwork(
        lambda: diffusers.QwenImageControlNetModel(**QWEN_IMAGE), qwen_image_controlnet_inputs, layers=2, **KEYS_ONLY
    ),
}
FAMILIES = {name: family for name, family in _ALL.items() if "qwen" not in name or is_supported("qwen_image")}
ROTARY = [name for name, family in FAMILIES.items() if not family.merges_queries]
