"""Flux.1 (dev, schnell, Kontext, Fill, Control) and its ControlNets: joint and single blocks with rotary embeddings."""

from typing import Any, Literal

import torch
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from torch import Tensor

from atc_diffusion.adapters import ImageInput, Kwargs, Layer, Merge, Place
from atc_diffusion.adapters.rotary import PACK, MergedProcessor, RotaryFamily, packed_image


class MergedFluxAttnProcessor(MergedProcessor):
    """`FluxAttnProcessor` with merged keys."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        merge: Merge | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attend from all of `hidden_states` `[B, S, C]` and of the text `[B, T, C]` to merged keys.

        Args:
            attn: the attention.
            hidden_states: the image's tokens in joint blocks, the text's and the image's in single ones.
            encoder_hidden_states: the text in joint blocks.
            attention_mask: refused together with `merge`.
            image_rotary_emb: cosines and sines `[T + S, D]` for text and image.
            merge: how the image's keys merge; None: not at all.
        """
        if merge is None:
            return self.original(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        if attention_mask is not None:
            raise ValueError("merging in Flux takes no attention_mask; leave it out, or call remove_patch")
        query, key, value = _projected(attn, hidden_states)
        if encoder_hidden_states is not None:
            pairs = zip(_projected_text(attn, encoder_hidden_states), (query, key, value), strict=True)
            query, key, value = (torch.cat(pair, dim=1) for pair in pairs)
        query, key = (_rotated(x, image_rotary_emb) for x in (query, key))
        attended = self.attend(query, key, value, merge)
        if encoder_hidden_states is None:
            return attended
        text, image = attended.split([encoder_hidden_states.shape[1], hidden_states.shape[1]], dim=1)
        return attn.to_out[1](attn.to_out[0](image.contiguous())), attn.to_add_out(text.contiguous())


class FluxFamily(RotaryFamily):
    """Merges the keys of the image's tokens, never those of the text or of Kontext's reference images."""

    processor = FluxAttnProcessor
    merged_processor = MergedFluxAttnProcessor

    def layers(self, network: Any) -> list[Layer]:
        return [
            Layer(f"{blocks}.{i}.attn", block, block.attn, PACK, block.attn.query_dim)
            for blocks in ("transformer_blocks", "single_transformer_blocks")
            for i, block in enumerate(getattr(network, blocks))
        ]

    def image(self, given: Kwargs) -> ImageInput:
        return packed_image(given, _grid(given["img_ids"]))

    def rotary(self, kwargs: Kwargs, place: Place) -> Any:
        cos, sin = kwargs["image_rotary_emb"]
        return place.of(cos, dim=0), place.of(sin, dim=0)

    def features(self, layer: Layer, tokens: Tensor, rotary: Any, which: Literal["keys", "values"]) -> Tensor:
        attn: Any = layer.attention
        _, key, value = _projected(attn, tokens)
        return (_rotated(key, rotary) if which == "keys" else value).flatten(2)


def _grid(img_ids: Tensor) -> tuple[int, int]:
    """Height and width in tokens of the first image in `img_ids` `[S, 3]`: which image, row and column each is."""
    ids = (img_ids[0] if img_ids.ndim == 3 else img_ids).cpu()
    first = ids[ids[:, 0] == ids[0, 0]]
    width = int((first[:, 1] == first[0, 1]).sum())
    return len(first) // width, width


def _projected(attn: Any, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values `[B, N, H, D]` of `tokens` `[B, N, C]`, queries and keys normed."""
    if attn.fused_projections:
        parts = attn.to_qkv(tokens).chunk(3, dim=-1)
    else:
        parts = attn.to_q(tokens), attn.to_k(tokens), attn.to_v(tokens)
    query, key, value = (_heads(attn, x) for x in parts)
    return attn.norm_q(query), attn.norm_k(key), value


def _projected_text(attn: Any, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same of the text `[B, T, C]`, by its own projections."""
    if attn.fused_projections:
        parts = attn.to_added_qkv(text).chunk(3, dim=-1)
    else:
        parts = attn.add_q_proj(text), attn.add_k_proj(text), attn.add_v_proj(text)
    query, key, value = (_heads(attn, x) for x in parts)
    return attn.norm_added_q(query), attn.norm_added_k(key), value


def _heads(attn: Any, x: Tensor) -> Tensor:
    return x.unflatten(-1, (-1, attn.head_dim))


def _rotated(x: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
    return x if rotary is None else apply_rotary_emb(x, rotary, sequence_dim=1)
