"""The networks that are timed: full size, random weights, and the inputs of one image with guidance."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel, PixArtTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from torch import Tensor, nn

from atc_eval.files import read_json

BATCH = 2  # one image with guidance
Draw = Callable[..., Tensor]
Inputs = dict[str, Any]

CONFIGS: dict[str, dict[str, Any]] = read_json(Path(__file__).with_name("full_size.json"))  # as diffusers writes them


@dataclass(frozen=True)
class Model:
    """A network to be timed."""

    title: str
    kind: type[nn.Module]
    config: dict[str, Any]  # arguments of `kind`
    text: Callable[[Any, Draw, int], Inputs]  # makes its inputs besides latents and timestep: (network, draw, pixels)
    sizes: tuple[int, ...] = (1024,)  # pixels a side that are timed on a GPU by default; on a CPU, only the first
    channels: int = 4  # of the latents
    blocks: int | None = None  # of its most frequent kind; None for a UNet
    levels: tuple[int, ...] = (2,)  # its two finest with self-attention
    is_rotary: bool = False  # whether it has rotary embeddings, so that only keys and values merge

    def build(self, blocks: int | None = None) -> Any:
        """The network, cut to `blocks` blocks of each kind if given."""
        depths = [name for name in ("num_layers", "num_single_layers") if name in signature(self.kind).parameters]
        return self.kind(**self.config | ({} if blocks is None else dict.fromkeys(depths, blocks)))

    def shape(self, pixels: int) -> tuple[int, ...]:
        """Shape of one image's latents; rotary networks take tokens, which are patches of 2 x 2 latents."""
        if self.is_rotary:
            return (pixels // 16) ** 2, 4 * self.channels
        return self.channels, pixels // 8, pixels // 8


def _unet_text(unet: Any, draw: Draw, pixels: int) -> Inputs:
    inputs: Inputs = {"encoder_hidden_states": draw(BATCH, 77, unet.config.cross_attention_dim)}
    if unet.config.addition_embed_type == "text_time":
        pooled = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
        times = torch.tensor([[pixels, pixels, 0, 0, pixels, pixels]] * BATCH, device=unet.device)
        inputs["added_cond_kwargs"] = {"text_embeds": draw(BATCH, pooled), "time_ids": times}
    return inputs


def _pixart_text(transformer: Any, draw: Draw, pixels: int) -> Inputs:
    text = draw(BATCH, 300, transformer.config.caption_channels)
    return {"encoder_hidden_states": text, "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}


def _sd3_text(transformer: Any, draw: Draw, pixels: int, num_tokens: int = 333) -> Inputs:
    """77 tokens of CLIP and 256 of T5."""
    text = draw(BATCH, num_tokens, transformer.config.joint_attention_dim)
    return {"encoder_hidden_states": text, "pooled_projections": draw(BATCH, transformer.config.pooled_projection_dim)}


def _flux_text(transformer: Any, draw: Draw, pixels: int) -> Inputs:
    """512 tokens of T5, and the positions of the image's tokens."""
    side = torch.arange(pixels // 16, device=transformer.device)
    places = torch.cartesian_prod(torch.zeros(1, device=transformer.device), side.float(), side.float())
    more = {"img_ids": places, "txt_ids": places.new_zeros(512, 3), "guidance": places.new_full((BATCH,), 3.5)}
    return _sd3_text(transformer, draw, pixels, num_tokens=512) | more


MODELS = {
    "sd15": Model(
        "Stable Diffusion v1.5's UNet",
        UNet2DConditionModel,
        CONFIGS["sd15"],
        _unet_text,
        (512, 1024, 2048),
        levels=(1, 2),
    ),
    "sdxl": Model("SDXL's UNet", UNet2DConditionModel, CONFIGS["sdxl"], _unet_text, levels=(2, 4)),
    "pixart-sigma": Model(
        "PixArt-Sigma", PixArtTransformer2DModel, CONFIGS["pixart-sigma"], _pixart_text, (1024, 2048), blocks=28
    ),
    "sd3-medium": Model("SD3-medium", SD3Transformer2DModel, CONFIGS["sd3-medium"], _sd3_text, channels=16, blocks=24),
    "flux-dev": Model(
        "FLUX.1-dev", FluxTransformer2DModel, CONFIGS["flux-dev"], _flux_text, (1024, 2048), 16, 38, is_rotary=True
    ),
}


@lru_cache(maxsize=1)
def load(model: str, device: str, dtype: torch.dtype, blocks: int | None = None) -> Any:
    torch.manual_seed(0)
    with torch.device(device):
        network = MODELS[model].build(blocks)
    return network.eval().requires_grad_(False).to(dtype)


def make_inputs(model: str, network: Any, pixels: int) -> tuple[Tensor, Inputs]:
    """An image's latents, equal in both halves of the batch, and its text."""
    draw = partial(torch.randn, device=network.device, dtype=network.dtype)
    return repeated(draw(1, *MODELS[model].shape(pixels))), MODELS[model].text(network, draw, pixels)


def repeated(latents: Tensor) -> Tensor:
    """The latents of one image, for both halves of the batch."""
    return latents.repeat(BATCH, *[1] * (latents.ndim - 1))
