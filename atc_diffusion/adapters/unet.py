"""Stable Diffusion 1, 2 and XL, ControlNet and PixArt: diffusers' `BasicTransformerBlock` and its `attn1`."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from diffusers.models import attention_processor
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import (
    AttnProcessor2_0,
    PAGCFGIdentitySelfAttnProcessor2_0,
    PAGIdentitySelfAttnProcessor2_0,
)
from diffusers.models.controlnets.controlnet_xs import ControlNetXSAdapter
from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from atc_diffusion.adapters import Kwargs, StandIn
from atc_diffusion.adapters.layer import Demands, Layer, MergedCall, Which, unwrapped
from atc_diffusion.adapters.token_merging import TokenFamily
from atc_diffusion.adapters.weights import aligned, attend
from atc_diffusion.merge_map import MergeMap

_MASKED = -1e3  # as good as -inf, and finite in float16, also times the root of a head's width
_LEVEL = re.compile(r"(?P<side>down|up)_blocks\.(?P<block>\d+)\.|mid_block\.")

# Perturbed-attention guidance (Ahn et al. 2024, arXiv 2403.17377): into how many parts its processors split the batch.
# The last part's attention is replaced by the identity.
PERTURBED: dict[type, int] = {PAGIdentitySelfAttnProcessor2_0: 2, PAGCFGIdentitySelfAttnProcessor2_0: 3}

# By name: which of them exist depends on the version of diffusers.
_ANY = ("AttnProcessor", "AttnProcessor2_0", "XFormersAttnProcessor", "SlicedAttnProcessor")
_KEYS_OF_QUERIES = {  # those that make keys of the queries' tokens alone, and the way out
    "FusedAttnProcessor2_0": "keys merged apart from queries need unfused projections; call unfuse_qkv_projections()",
    "CustomDiffusionAttnProcessor": "custom diffusion needs as many keys as queries; leave r_keys out",
}


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


_PERTURBED_OR_OURS = (*PERTURBED, MergedPerturbedAttnProcessor, WiderHeadsAttnProcessor)


class UNetFamily(TokenFamily):
    """Merges what is passed to `attn1`, and puts the weights into the additive mask that its processors take."""

    def layers(self, network: nn.Module) -> list[Layer]:
        return [
            Layer.within(block, path, "attn1", level)
            for path, block, level in _blocks(network)
            if not block.only_cross_attention
        ]

    def stand_ins(self, wider_heads: bool) -> Mapping[type, type[StandIn]]:
        """Hooks are enough, except to widen heads, and for perturbed attention, whose keys are the queries' tokens."""
        perturbed = dict.fromkeys(PERTURBED, MergedPerturbedAttnProcessor)
        return perturbed | {AttnProcessor2_0: WiderHeadsAttnProcessor} if wider_heads else perturbed

    def obstacle(self, layer: Layer, demands: Demands) -> str | None:
        if type(layer.block).__name__ == "ToMeBlock":
            return "is patched by tomesd too; call tomesd.remove_patch, or remove_patch"
        kind = type(layer.attention.processor)
        name = kind.__name__ if kind.__module__ == attention_processor.__name__ else ""
        if demands.wider_heads and kind not in (AttnProcessor2_0, WiderHeadsAttnProcessor):
            way_out = "wider heads need diffusers' AttnProcessor2_0; set that one, or leave out widen_heads"
        elif demands.separate_keys and name in _KEYS_OF_QUERIES:
            way_out = _KEYS_OF_QUERIES[name]
        elif name in (*_ANY, *_KEYS_OF_QUERIES) or kind in _PERTURBED_OR_OURS:
            return super().obstacle(layer, demands)
        else:
            way_out = f"it is not known to work with merged tokens; known are diffusers' {', '.join(_ANY)}"
        return f"has a {kind.__module__}.{kind.__name__}: {way_out}, or remove_patch"

    def project(self, attention: Any, tokens: Tensor, which: Which) -> Tensor:
        return (attention.to_k if which == "keys" else attention.to_v)(tokens)

    def merged(self, attention: Any, given: Kwargs, merge: MergedCall) -> Kwargs:
        tokens = given["hidden_states"]
        given = given | {"hidden_states": merge.merge_queries(tokens)}
        if given.get("encoder_hidden_states") is None:
            if merge.keys is not merge.queries:
                given["encoder_hidden_states"] = merge.merge_keys(tokens)
            given |= _weights(attention, given.get("attention_mask"), merge, tokens)
        return given


def _blocks(network: Any) -> Iterator[tuple[str, Any, int]]:
    """Path, block and level of the transformer blocks on images; blocks over frames are in other classes."""
    if isinstance(network, ControlNetXSAdapter):
        return  # never called: UNetControlNetXSModel has copies of its blocks
    if isinstance(network, PixArtTransformer2DModel):
        for i, block in enumerate(map(unwrapped, network.transformer_blocks)):
            yield f"transformer_blocks.{i}", block, network.config.patch_size
        return
    for name, transformer in network.named_modules():
        place = _LEVEL.match(name)
        if place and isinstance(transformer, Transformer2DModel):
            for i, block in enumerate(map(unwrapped, transformer.transformer_blocks)):
                if isinstance(block, BasicTransformerBlock):
                    yield f"{name}.transformer_blocks.{i}", block, _level(place, len(network.down_blocks))


def _level(place: re.Match[str], num_levels: int) -> int:
    """1 for `down_blocks.0` and the last up block, twice as much for each level below."""
    if place["side"] is None:
        return 2 ** (num_levels - 1)
    block = int(place["block"])
    return 2 ** (block if place["side"] == "down" else num_levels - 1 - block)


def _weights(attention: Any, mask: Tensor | None, merge: MergedCall, tokens: Tensor) -> Kwargs:
    """The attention's arguments that weigh merged keys, if they have weights.

    The mask `[B * H, 1, K]` is repeated for the heads here, because the copies that diffusers makes are not aligned.
    """
    if merge.keys is None or (mask is None and not merge.weigh):
        return {}
    logs = _log_weights(mask, merge.keys, merge.weigh)[: attended_items(attention, len(tokens))]
    if merge.widen:
        return {"attention_mask": None, "log_weights": logs[:, 0]}
    return {"attention_mask": aligned(logs.to(tokens.dtype).repeat_interleave(attention.heads, dim=0))}


def _log_weights(mask: Tensor | None, keys: MergeMap, weigh: bool) -> Tensor:
    """`[B, 1, K]` float32: the logarithms of the weights of merged keys (Bolya et al. 2023, Eq. 1).

    A mask `[B, 1, N]` that is there already gives every token the weight exp(mask).
    """
    sizes = keys.sizes[:, None, :].float()
    weights = sizes if weigh else torch.ones_like(sizes)
    if mask is not None:
        if mask.ndim != 3 or mask.shape[1] != 1:
            raise ValueError(f"merging takes attention masks [B, 1, N], one for all queries, got {list(mask.shape)}")
        weights = weights * keys.merge(mask.float().exp().mT).mT
    return weights.log().clamp(min=_MASKED)
