"""Z-Image: diffusers' single-stream attention, where the text follows the image in one sequence."""

from typing import Any, Literal

import torch
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_z_image import (
    SEQ_MULTI_OF,
    ZSingleStreamAttnProcessor,
)
from torch import Tensor, nn

from atc_diffusion.adapters import ImageInput, Kwargs, Layer, Merge, Place
from atc_diffusion.adapters.rotary import MergedProcessor, RotaryFamily


class MergedZImageAttnProcessor(MergedProcessor):
    """`ZSingleStreamAttnProcessor` with merged keys."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        freqs_cis: Tensor | None = None,
        merge: Merge | None = None,
    ) -> Tensor:
        """Attend from all of `hidden_states` `[B, S, C]` to merged keys.

        Args:
            attn: the attention.
            hidden_states: the image's tokens, padding, and the text's.
            encoder_hidden_states: ignored, as it is by the original.
            attention_mask: bool `[B, S]`, which tokens are attended to; all of the image are.
            freqs_cis: complex rotations `[B, S, D / 2]`.
            merge: how the image's keys merge; None: not at all.
        """
        if merge is None:
            return self.original(attn, hidden_states, encoder_hidden_states, attention_mask, freqs_cis)
        query = _rotated(attn.norm_q, _heads(attn, attn.to_q(hidden_states)), freqs_cis)
        key = _rotated(attn.norm_k, _heads(attn, attn.to_k(hidden_states)), freqs_cis)
        value = _heads(attn, attn.to_v(hidden_states))
        mask = None if attention_mask is None else attention_mask[:, None, None]
        attended = attn.to_out[0](self.attend(query, key, value, merge, mask))
        return attn.to_out[1](attended) if len(attn.to_out) > 1 else attended


class ZImageFamily(RotaryFamily):
    """Merges the keys of the image's tokens in the main layers, never those of the text or of the padding.

    The refiners, two layers each, stay as they are: a ControlNet calls those of the image outside the network's call.
    """

    processor = ZSingleStreamAttnProcessor
    merged_processor = MergedZImageAttnProcessor

    def layers(self, network: Any) -> list[Layer]:
        patch_size = network.config.all_patch_size[0]
        return [
            Layer(f"layers.{i}.attention", block, block.attention, patch_size, block.attention.query_dim)
            for i, block in enumerate(network.layers)
        ]

    def image(self, given: Kwargs) -> ImageInput:
        others = dict(given)
        images, timestep = others.pop("x"), others.pop("t")
        if isinstance(images[0], list) or len({x.shape for x in images}) > 1:
            raise ValueError("merging in Z-Image takes one image for each prompt, all of one size; call remove_patch")
        latents = torch.stack(list(images))
        height, width = latents.shape[-2:]
        num_tokens = height * width // given.get("patch_size", 2) ** 2
        text = max(_padded(len(features)) for features in given["cap_feats"])
        after = _padded(num_tokens) + text - num_tokens
        return ImageInput(latents, (height, width), 1000 * (1 - timestep), others, after)

    def rotary(self, kwargs: Kwargs, place: Place) -> Any:
        """Of the first item: the others' differ by a rotation that all tokens of an item have in common."""
        return place.of(kwargs["freqs_cis"][:1], dim=1)

    def features(self, layer: Layer, tokens: Tensor, rotary: Any, which: Literal["keys", "values"]) -> Tensor:
        attn: Any = layer.attention
        if which == "values":
            return attn.to_v(tokens)
        return _rotated(attn.norm_k, _heads(attn, attn.to_k(tokens)), rotary).flatten(2)


def _padded(length: int) -> int:
    return length + -length % SEQ_MULTI_OF


def _heads(attn: Any, x: Tensor) -> Tensor:
    return x.unflatten(-1, (attn.heads, -1))


def _rotated(norm: nn.Module | None, x: Tensor, rotary: Tensor | None) -> Tensor:
    x = x if norm is None else norm(x)
    return x if rotary is None else apply_rotary_emb(x, rotary, use_real=False)
