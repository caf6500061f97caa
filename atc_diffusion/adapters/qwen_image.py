"""Qwen-Image, Edit and Edit-Plus, and its ControlNet: double-stream attention with a mask of the text."""

from typing import Any

from diffusers.models.transformers.transformer_qwenimage import QwenDoubleStreamAttnProcessor2_0

from atc_diffusion.adapters import ImageInput, Kwargs, StandIn, argument
from atc_diffusion.adapters.layer import Layer
from atc_diffusion.adapters.rotary import PACK, RotaryFamily, packed_image, with_merged_keys


class MergedQwenAttnProcessor(StandIn):
    """`QwenDoubleStreamAttnProcessor2_0` with merged keys."""

    __call__ = with_merged_keys(QwenDoubleStreamAttnProcessor2_0)


class QwenImageFamily(RotaryFamily):
    """Merges the keys of the image's tokens, never those of the text or of images to edit."""

    processor = QwenDoubleStreamAttnProcessor2_0
    stand_in = MergedQwenAttnProcessor

    def layers(self, network: Any) -> list[Layer]:
        if getattr(network.config, "use_layer3d_rope", False):
            return []  # Qwen-Image-Layered, whose image is on several grids
        return [
            Layer.within(block, f"transformer_blocks.{i}", "attn", PACK)
            for i, block in enumerate(network.transformer_blocks)
        ]

    def image(self, given: Kwargs) -> ImageInput:
        return packed_image(given, _grid(argument(given, "img_shapes")))


def _grid(img_shapes: Any) -> tuple[int, int]:
    """Height and width in tokens of the first image in `img_shapes`: of each item, or of all, (1, height, width)."""
    shapes = img_shapes[0]
    _, height, width = shapes[0] if isinstance(shapes, list) else shapes
    return height, width
