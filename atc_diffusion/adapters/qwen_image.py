"""Qwen-Image, Edit and Edit-Plus, and its ControlNet: double-stream attention with a mask of the text."""

from typing import Any, Literal

import torch
from diffusers.models.transformers.transformer_qwenimage import (
    QwenDoubleStreamAttnProcessor2_0,
    apply_rotary_emb_qwen,
)
from torch import Tensor, nn
from torch.nn import functional as F

from atc_diffusion.adapters import ImageInput, Kwargs, Layer, Merge, Place
from atc_diffusion.adapters.rotary import PACK, MergedProcessor, RotaryFamily, packed_image


class MergedQwenAttnProcessor(MergedProcessor):
    """`QwenDoubleStreamAttnProcessor2_0` with merged keys."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        encoder_hidden_states_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        merge: Merge | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Attend from all of `hidden_states` `[B, S, C]` and of the text `[B, T, C]` to merged keys.

        Args:
            attn: the attention.
            hidden_states: the image's tokens, and those of images to edit behind them.
            encoder_hidden_states: the text.
            encoder_hidden_states_mask: bool `[B, T]`, which tokens of the text are attended to.
            attention_mask: refused by diffusers' processor.
            image_rotary_emb: complex rotations `[S, D / 2]` of the images, `[T, D / 2]` of the text.
            merge: how the image's keys merge; None: not at all.
        """
        if merge is None or encoder_hidden_states is None or attention_mask is not None:
            return self.original(
                attn, hidden_states, encoder_hidden_states, encoder_hidden_states_mask, attention_mask, image_rotary_emb
            )
        image_rotary, text_rotary = image_rotary_emb or (None, None)
        text = _projected_text(attn, encoder_hidden_states, text_rotary)
        image = _projected(attn, hidden_states, image_rotary)
        query, key, value = (torch.cat(pair, dim=1) for pair in zip(text, image, strict=True))
        mask = _joint_mask(encoder_hidden_states_mask, hidden_states)
        attended = self.attend(query, key, value, merge, mask)
        of_text, of_image = attended.split([encoder_hidden_states.shape[1], hidden_states.shape[1]], dim=1)
        of_image = attn.to_out[0](of_image.contiguous())
        if len(attn.to_out) > 1:
            of_image = attn.to_out[1](of_image)
        return of_image, attn.to_add_out(of_text.contiguous())


class QwenImageFamily(RotaryFamily):
    """Merges the keys of the image's tokens, never those of the text or of images to edit."""

    processor = QwenDoubleStreamAttnProcessor2_0
    merged_processor = MergedQwenAttnProcessor

    def layers(self, network: Any) -> list[Layer]:
        if getattr(network.config, "use_layer3d_rope", False):
            return []  # Qwen-Image-Layered, whose image is on several grids
        return [
            Layer(f"transformer_blocks.{i}.attn", block, block.attn, PACK, block.attn.query_dim)
            for i, block in enumerate(network.transformer_blocks)
        ]

    def image(self, given: Kwargs) -> ImageInput:
        return packed_image(given, _grid(given["img_shapes"]))

    def rotary(self, kwargs: Kwargs, place: Place) -> Any:
        return place.of(kwargs["image_rotary_emb"][0], dim=0)

    def features(self, layer: Layer, tokens: Tensor, rotary: Any, which: Literal["keys", "values"]) -> Tensor:
        attn: Any = layer.attention
        if which == "values":
            return attn.to_v(tokens)
        return _rotated(attn.norm_k, _heads(attn, attn.to_k(tokens)), rotary).flatten(2)


def _grid(img_shapes: Any) -> tuple[int, int]:
    """Height and width in tokens of the first image in `img_shapes`: of each item, or of all, (1, height, width)."""
    shapes = img_shapes[0]
    _, height, width = shapes[0] if isinstance(shapes, list) else shapes
    return height, width


def _projected(attn: Any, tokens: Tensor, rotary: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values `[B, N, H, D]` of the images' `tokens` `[B, N, C]`, queries and keys rotated."""
    query, key, value = (_heads(attn, project(tokens)) for project in (attn.to_q, attn.to_k, attn.to_v))
    return _rotated(attn.norm_q, query, rotary), _rotated(attn.norm_k, key, rotary), value


def _projected_text(attn: Any, text: Tensor, rotary: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The same of the text `[B, T, C]`, by its own projections."""
    projections = attn.add_q_proj, attn.add_k_proj, attn.add_v_proj
    query, key, value = (_heads(attn, project(text)) for project in projections)
    return _rotated(attn.norm_added_q, query, rotary), _rotated(attn.norm_added_k, key, rotary), value


def _heads(attn: Any, x: Tensor) -> Tensor:
    return x.unflatten(-1, (-1, attn.inner_dim // attn.heads))


def _rotated(norm: nn.Module | None, x: Tensor, rotary: Tensor | None) -> Tensor:
    x = x if norm is None else norm(x)
    return x if rotary is None else apply_rotary_emb_qwen(x, rotary, use_real=False)


def _joint_mask(of_text: Tensor | None, images: Tensor) -> Tensor | None:
    """Bool `[B, 1, 1, T + S]`: which keys are attended to, by the mask `[B, T]` of the text; all of `images` are."""
    if of_text is None:
        return None
    return F.pad(of_text, (0, images.shape[1]), value=True)[:, None, None]
