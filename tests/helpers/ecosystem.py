"""What people use beside a patch: LoRA, IP-Adapter, FreeU, DeepCache and offloading."""

from typing import Any

import numpy as np
import torch
from accelerate import cpu_offload
from DeepCache import DeepCacheSDHelper
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import IPAdapterAttnProcessor
from diffusers.models.embeddings import ImageProjection
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

from atc_diffusion.testing import UNET
from tests.helpers.drawing import PARTS, draw, text

LORA = LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False)
CPU = torch.device("cpu")


def pipeline(components: dict[str, Any]) -> Any:
    return StableDiffusionPipeline(**components, **PARTS)


def picture(pipe: Any, **options: Any) -> np.ndarray:
    return draw(pipe, text(1), height=16, width=16, **options)


def lora_weights(unet: nn.Module) -> dict[str, Tensor]:
    twin = UNet2DConditionModel(**UNET)
    twin.add_adapter(LORA)
    return {f"unet.{name}": weight for name, weight in get_peft_model_state_dict(twin).items()}


def load_lora(pipe: Any) -> dict[str, Any]:
    pipe.load_lora_weights(lora_weights(pipe.unet))
    return {}


def fuse_lora(pipe: Any) -> dict[str, Any]:
    load_lora(pipe)
    pipe.fuse_lora()
    return {}


def load_ip_adapter(pipe: Any) -> dict[str, Any]:
    crosses = [name for name in pipe.unet.attn_processors if "attn2" in name]
    sizes = [pipe.unet.get_submodule(name.removesuffix(".processor")).query_dim for name in crosses]
    attention: dict[str, Tensor] = {}
    for i, size in enumerate(sizes):
        weights = IPAdapterAttnProcessor(size, 12).state_dict()
        attention |= {f"{2 * i + 1}.to_{x}_ip.weight": weights[f"to_{x}_ip.0.weight"] for x in "kv"}
    projection = ImageProjection(12, 12, num_image_text_embeds=4).state_dict()
    image_proj = {name.replace("image_embeds", "proj"): weight for name, weight in projection.items()}
    pipe.load_ip_adapter({"image_proj": image_proj, "ip_adapter": attention}, None, None, image_encoder_folder=None)
    return {"ip_adapter_image_embeds": [torch.ones(2, 1, 12)]}


def enable_freeu(pipe: Any) -> dict[str, Any]:
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
    return {}


def enable_deep_cache(pipe: Any) -> dict[str, Any]:
    helper = DeepCacheSDHelper(pipe)
    helper.set_params(cache_interval=2, cache_branch_id=0)
    helper.enable()
    return {}


def offload_model(pipe: Any) -> dict[str, Any]:
    pipe.enable_model_cpu_offload(device="cpu")
    return {}


def offload_sequentially(pipe: Any) -> dict[str, Any]:
    """What `enable_sequential_cpu_offload` does, which itself insists on another device."""
    for model in (pipe.vae, pipe.unet):
        cpu_offload(model, CPU)
    return {}


def offload_groups(pipe: Any) -> dict[str, Any]:
    pipe.unet.enable_group_offload(CPU, CPU, offload_type="leaf_level")
    return {}


def offload_blocks(pipe: Any) -> dict[str, Any]:
    pipe.unet.enable_group_offload(CPU, CPU, offload_type="block_level", num_blocks_per_group=1)
    return {}
