"""Flux.1 (dev, schnell, Kontext, Fill, Control) and its ControlNets: joint and single blocks with rotary embeddings."""

from typing import Any

from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from torch import Tensor

from atc_diffusion.adapters import ImageInput, Kwargs, StandIn, argument
from atc_diffusion.adapters.layer import Layer
from atc_diffusion.adapters.rotary import PACK, RotaryFamily, packed_image, with_merged_keys


class MergedFluxAttnProcessor(StandIn):
    """`FluxAttnProcessor` with merged keys."""

    __call__ = with_merged_keys(FluxAttnProcessor)


class FluxFamily(RotaryFamily):
    """Merges the keys of the image's tokens, never those of the text or of Kontext's reference images."""

    processor = FluxAttnProcessor
    stand_in = MergedFluxAttnProcessor
    masks_text = False

    def layers(self, network: Any) -> list[Layer]:
        return [
            Layer.within(block, f"{blocks}.{i}", "attn", PACK)
            for blocks in ("transformer_blocks", "single_transformer_blocks")
            for i, block in enumerate(getattr(network, blocks))
        ]

    def image(self, given: Kwargs) -> ImageInput:
        return packed_image(given, _grid(argument(given, "img_ids")))


def _grid(img_ids: Tensor) -> tuple[int, int]:
    """Height and width in tokens of the first image in `img_ids` `[S, 3]`: which image, row and column each is."""
    ids = (img_ids[0] if img_ids.ndim == 3 else img_ids).cpu()
    first = ids[ids[:, 0] == ids[0, 0]]
    width = int((first[:, 1] == first[0, 1]).sum())
    return len(first) // width, width
