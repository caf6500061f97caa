"""Z-Image: diffusers' single-stream attention, where the text follows the image in one sequence."""

from typing import Any

import torch
from diffusers.models.transformers.transformer_z_image import SEQ_MULTI_OF, ZSingleStreamAttnProcessor
from torch import Tensor

from atc_diffusion.adapters import ImageInput, Kwargs, StandIn, argument, like, without
from atc_diffusion.adapters.layer import Layer
from atc_diffusion.adapters.noise import NoiseSchedule, flow
from atc_diffusion.adapters.rotary import RotaryFamily, with_merged_keys


class MergedZImageAttnProcessor(StandIn):
    """`ZSingleStreamAttnProcessor` with merged keys."""

    __call__ = with_merged_keys(ZSingleStreamAttnProcessor)


class ZImageFamily(RotaryFamily):
    """Merges the keys of the image's tokens in the main layers, never those of the text or of the padding.

    The refiners, two layers each, stay as they are: a ControlNet calls those of the image outside the network's call.
    """

    processor = ZSingleStreamAttnProcessor
    stand_in = MergedZImageAttnProcessor

    def layers(self, network: Any) -> list[Layer]:
        patch_size = network.config.all_patch_size[0]
        return [Layer.within(block, f"layers.{i}", "attention", patch_size) for i, block in enumerate(network.layers)]

    def image(self, given: Kwargs) -> ImageInput:
        images, timestep, others = argument(given, "x"), argument(given, "t"), without(given, "x", "t")
        if isinstance(images[0], list) or len({x.shape for x in images}) > 1:
            raise ValueError("merging in Z-Image takes one image for each prompt, all of one size; call remove_patch")
        latents = torch.stack(list(images))
        height, width = latents.shape[-2:]
        num_tokens = height * width // given.get("patch_size", 2) ** 2
        text = max(_padded(len(features)) for features in argument(given, "cap_feats"))
        after = _padded(num_tokens) + text - num_tokens
        return ImageInput.of(latents, (height, width), 1000 * (1 - timestep), others, after)

    def noise(self, scheduler: Any) -> NoiseSchedule:
        return flow("reversed_flow")

    def output(self, returned: Any, latents: Tensor) -> Tensor:
        return torch.stack(list(returned[0]))

    def returned(self, template: Any, output: Tensor) -> Any:
        output = output.to(template[0][0].dtype)
        return like(template, list(output) if isinstance(template[0], list) else output)


def _padded(length: int) -> int:
    return length + -length % SEQ_MULTI_OF
