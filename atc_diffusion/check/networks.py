"""A tiny network of every family, merged on a device, against the same on the CPU in float32."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from atc_diffusion.check.finding import Finding, find
from atc_diffusion.methods import ATCConfig
from atc_diffusion.patch import apply_patch

QUERIES_AND_KEYS, KEYS = ATCConfig(r=0.75, r_keys=0.5), ATCConfig(r=1.0, r_keys=0.5)
ROTARY = ("FluxTransformer2DModel", "QwenImageTransformer2DModel", "ZImageTransformer2DModel")
# Roundings of the features decide which tokens are merged where distances nearly tie.
TOLERANCES = {torch.float32: 0.02, torch.float16: 0.05, torch.bfloat16: 0.1}

Inputs = dict[str, Any]


def check_networks(device: torch.device) -> Iterator[Finding]:
    for name, make in NETWORKS.items():
        torch.manual_seed(0)
        network, inputs = make()
        expected = merged_output(network, inputs)
        for dtype, tolerance in TOLERANCES.items():
            subject = f"{name} merged on {device} in {str(dtype).removeprefix('torch.')}"
            yield find(subject, partial(error_of, network, inputs, device, dtype, expected), tolerance)


def error_of(
    network: nn.Module,
    inputs: Inputs,
    device: torch.device,
    dtype: torch.dtype,
    expected: Tensor,
    widen_heads: bool = False,
) -> float:
    """Relative error of the merged network on a device and in a precision."""
    there = copy.deepcopy(network).to(device, dtype)
    output = merged_output(there, tree_map(partial(_moved, device=device, dtype=dtype), inputs), widen_heads)
    return ((output - expected).norm() / expected.norm()).item()


@torch.no_grad()
def merged_output(network: nn.Module, inputs: Inputs, widen_heads: bool = False) -> Tensor:
    """The output, in float32 on the CPU, of a copy of `network` that is merged."""
    merged = copy.deepcopy(network)
    config = KEYS if type(network).__name__ in ROTARY else QUERIES_AND_KEYS
    apply_patch(merged, replace(config, widen_heads=widen_heads))
    output = merged(**inputs, return_dict=False)[0]
    return (torch.stack(output) if isinstance(output, list) else output).float().cpu()


def _moved(x: Any, device: torch.device, dtype: torch.dtype) -> Any:
    if not isinstance(x, Tensor):
        return x
    return x.to(device, dtype if x.is_floating_point() else x.dtype)


def make_unet(**options: Any) -> tuple[nn.Module, Inputs]:
    from diffusers import UNet2DConditionModel

    sizes = {"sample_size": 16, "block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 4}
    attentions = {"cross_attention_dim": 12, "attention_head_dim": 2}
    blocks = {"down_block_types": ("CrossAttnDownBlock2D",) * 2, "up_block_types": ("CrossAttnUpBlock2D",) * 2}
    network = UNet2DConditionModel(**sizes | attentions | blocks | options).eval()
    return network, _inputs("sample", 4)


def _make_sdxl() -> tuple[nn.Module, Inputs]:
    network, inputs = make_unet(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + 10,
    )
    return network, inputs | {"added_cond_kwargs": {"text_embeds": torch.randn(2, 10), "time_ids": torch.ones(2, 6)}}


def _make_pixart() -> tuple[nn.Module, Inputs]:
    from diffusers import PixArtTransformer2DModel

    heads = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "norm_num_groups": 1}
    network = PixArtTransformer2DModel(**heads, sample_size=16, cross_attention_dim=16, caption_channels=12).eval()
    return network, _inputs("hidden_states", 4) | {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}


def _make_sd3() -> tuple[nn.Module, Inputs]:
    from diffusers import SD3Transformer2DModel

    sizes = {
        "sample_size": 16,
        "in_channels": 16,
        "num_layers": 2,
        "pos_embed_max_size": 16,
        "pooled_projection_dim": 10,
    }
    heads = {"attention_head_dim": 8, "num_attention_heads": 2}
    network = SD3Transformer2DModel(**sizes, **heads, joint_attention_dim=12, caption_projection_dim=16).eval()
    return network, _inputs("hidden_states", 16) | {"pooled_projections": torch.randn(2, 10)}


def _make_flux() -> tuple[nn.Module, Inputs]:
    from diffusers import FluxTransformer2DModel

    blocks = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2}
    network = FluxTransformer2DModel(
        **blocks, in_channels=16, joint_attention_dim=12, pooled_projection_dim=10, axes_dims_rope=(2, 2, 4)
    )
    side = torch.arange(8.0)
    places = {"img_ids": torch.cartesian_prod(torch.zeros(1), side, side), "txt_ids": torch.zeros(5, 3)}
    return network.eval(), _tokens() | places | {"pooled_projections": torch.randn(2, 10)}


def _make_qwen_image() -> tuple[nn.Module, Inputs]:
    from diffusers import QwenImageTransformer2DModel

    heads = {"num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2, "axes_dims_rope": (2, 2, 4)}
    network = QwenImageTransformer2DModel(**heads, in_channels=16, joint_attention_dim=12).eval()
    mask = {"encoder_hidden_states_mask": torch.tensor([[1] * 5, [1] * 3 + [0] * 2])}
    return network, _tokens() | mask | {"img_shapes": [[(1, 8, 8)]] * 2}


def _make_z_image() -> tuple[nn.Module, Inputs]:
    from diffusers import ZImageTransformer2DModel

    sizes = {"in_channels": 4, "dim": 16, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2}
    rotary = {"axes_dims": [2, 2, 4], "axes_lens": [256, 32, 32]}
    network = ZImageTransformer2DModel(**sizes, **rotary, cap_feat_dim=12).eval()
    pictures = [torch.randn(4, 1, 16, 16) for _ in range(2)]
    return network, {"x": pictures, "cap_feats": [torch.randn(5, 12)] * 2, "t": torch.tensor([0.5, 0.5])}


def _tokens() -> Inputs:
    """Of two pictures with 8 x 8 tokens, and of their texts."""
    text = {"encoder_hidden_states": torch.randn(2, 5, 12)}
    return text | {"hidden_states": torch.randn(2, 64, 16), "timestep": torch.tensor([0.5, 0.5])}


def _inputs(name: str, channels: int) -> Inputs:
    latents = torch.randn(2, channels, 16, 16)
    return {name: latents, "encoder_hidden_states": torch.randn(2, 5, 12), "timestep": torch.tensor([500, 500])}


NETWORKS: dict[str, Callable[[], tuple[nn.Module, Inputs]]] = {
    "Stable Diffusion 1": make_unet,
    "Stable Diffusion XL": _make_sdxl,
    "PixArt": _make_pixart,
    "Stable Diffusion 3": _make_sd3,
    "Flux": _make_flux,
    "Qwen-Image": _make_qwen_image,
    "Z-Image": _make_z_image,
}
