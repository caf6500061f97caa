"""Flux.1 (dev, schnell, Kontext, Fill, Control) and its ControlNets: joint and single blocks with rotary embeddings."""

from typing import Any, Literal

from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor, _get_qkv_projections
from torch import Tensor

from atc_diffusion.adapters import Args, ImageInput, ImageSlice, Kwargs, Layer, MergedCall
from atc_diffusion.adapters.rotary import PACK, RotaryFamily, packed_image, with_merged_keys
from atc_diffusion.adapters.stand_in import StandIn


class MergedFluxAttnProcessor(StandIn):
    """`FluxAttnProcessor` with merged keys."""

    __call__ = with_merged_keys(FluxAttnProcessor)


class FluxFamily(RotaryFamily):
    """Merges the keys of the image's tokens, never those of the text or of Kontext's reference images."""

    processor = FluxAttnProcessor
    stand_in = MergedFluxAttnProcessor

    def layers(self, network: Any) -> list[Layer]:
        return [
            Layer.within(block, f"{blocks}.{i}", "attn", PACK)
            for blocks in ("transformer_blocks", "single_transformer_blocks")
            for i, block in enumerate(getattr(network, blocks))
        ]

    def image(self, given: Kwargs) -> ImageInput:
        return packed_image(given, _grid(given["img_ids"]))

    def rotary(self, kwargs: Kwargs, image: ImageSlice) -> Any:
        cos, sin = kwargs["image_rotary_emb"]
        return image.of(cos, dim=0), image.of(sin, dim=0)

    def features(self, attention: Any, tokens: Tensor, rotary: Any, which: Literal["keys", "values"]) -> Tensor:
        _, key, value = _get_qkv_projections(attention, tokens)[:3]
        if which == "values":
            return value
        key = attention.norm_k(key.unflatten(-1, (-1, attention.head_dim)))
        return apply_rotary_emb(key, rotary, sequence_dim=1).flatten(2)

    def merge(self, attention: Any, args: Args, kwargs: Kwargs, merge: MergedCall) -> tuple[Args, Kwargs]:
        if merge.keys is not None and kwargs.get("attention_mask") is not None:
            raise ValueError("merging in Flux takes no attention_mask; leave it out, or call remove_patch")
        return super().merge(attention, args, kwargs, merge)


def _grid(img_ids: Tensor) -> tuple[int, int]:
    """Height and width in tokens of the first image in `img_ids` `[S, 3]`: which image, row and column each is."""
    ids = (img_ids[0] if img_ids.ndim == 3 else img_ids).cpu()
    first = ids[ids[:, 0] == ids[0, 0]]
    width = int((first[:, 1] == first[0, 1]).sum())
    return len(first) // width, width
