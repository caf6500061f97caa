"""Processors that stand in where hooks on the attention of a UNet are not enough."""

from typing import Any

import torch
from diffusers.models.attention_processor import (
    AttnProcessor2_0,
    PAGCFGIdentitySelfAttnProcessor2_0,
    PAGIdentitySelfAttnProcessor2_0,
)
from torch import Tensor

from atc_diffusion.adapters.stand_in import StandIn
from atc_diffusion.adapters.weights import attend

# Perturbed-attention guidance (Ahn et al. 2024, arXiv 2403.17377): into how many parts its processors split the batch.
# The last part's attention is replaced by the identity.
PERTURBED: dict[type, int] = {PAGIdentitySelfAttnProcessor2_0: 2, PAGCFGIdentitySelfAttnProcessor2_0: 3}


class MergedPerturbedAttnProcessor(StandIn):
    """A processor of `PERTURBED` whose keys and values may come from other tokens than its queries."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """Attend from `hidden_states` `[B, Q, C]` to `encoder_hidden_states` `[B, K, C]`, except in the last part.

        In the last part, each token attends only to itself. Without `encoder_hidden_states`, calls the original.
        """
        if encoder_hidden_states is None:
            return self.original(attn, hidden_states, attention_mask=attention_mask, temb=temb)
        attended = attended_items(attn, len(hidden_states))
        queries, perturbed = hidden_states.tensor_split([attended])
        keys = encoder_hidden_states[:attended]
        output = AttnProcessor2_0()(attn, queries, keys, attention_mask, temb)
        return torch.cat([output, attn.to_out[1](attn.to_out[0](attn.to_v(perturbed)))])


def attended_items(attn: Any, batch: int) -> int:
    """How many items of a batch have attention; the others are perturbed."""
    processor = attn.processor
    if isinstance(processor, MergedPerturbedAttnProcessor):
        processor = processor.original
    parts = PERTURBED.get(type(processor))
    return batch if parts is None else batch // parts * (parts - 1)


class WiderHeadsAttnProcessor(StandIn):
    """`AttnProcessor2_0` that takes weights of merged keys, and adds their logarithms in channels of the heads."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        log_weights: Tensor | None = None,
    ) -> Tensor:
        """Attend from `hidden_states` `[B, Q, C]` to `encoder_hidden_states` `[B, K, C]`, or to the same tokens.

        Without `log_weights` `[B, K]`, which are added to the logits, calls the original.
        """
        if log_weights is None:
            return self.original(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        tokens = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        projected = attn.to_q(hidden_states), attn.to_k(tokens), attn.to_v(tokens)
        query, key, value = (x.unflatten(2, (attn.heads, -1)) for x in projected)
        attended = attend(query, key, value, log_weights, widen=True).flatten(2)
        return attn.to_out[1](attn.to_out[0](attended))
