"""Stable Diffusion 3 and 3.5 and their ControlNets: diffusers' joint attention of image and text."""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.attention import JointTransformerBlock
from diffusers.models.attention_processor import JointAttnProcessor2_0
from diffusers.models.controlnets.controlnet_sd3 import SD3ControlNetModel
from diffusers.models.transformers.transformer_sd3 import SD3SingleTransformerBlock, SD3Transformer2DModel
from torch import Tensor, nn
from torch.nn import functional as F

from atc_diffusion.adapters import Kwargs, StandIn
from atc_diffusion.adapters.layer import Demands, Layer, MergedCall, Which, unwrapped
from atc_diffusion.adapters.noise import NoiseSchedule, flow
from atc_diffusion.adapters.token_merging import TokenFamily
from atc_diffusion.adapters.weights import attend


class SD3Family(TokenFamily):
    """Merges image tokens, never text tokens. Replaces diffusers' joint processor, which ignores its mask."""

    def layers(self, network: nn.Module) -> list[Layer]:
        if not isinstance(network, SD3Transformer2DModel | SD3ControlNetModel):
            return []
        return [
            Layer.within(block, f"transformer_blocks.{i}", name, network.config.patch_size)
            for i, block in enumerate(map(unwrapped, network.transformer_blocks))
            if isinstance(block, JointTransformerBlock | SD3SingleTransformerBlock)
            for name in ("attn", "attn2")
            if getattr(block, name, None) is not None
        ]

    def stand_ins(self, wider_heads: bool) -> Mapping[type, type[StandIn]]:
        return {JointAttnProcessor2_0: MergedJointAttnProcessor}

    def obstacle(self, layer: Layer, demands: Demands) -> str | None:
        kind = type(layer.attention.processor)
        if kind in (JointAttnProcessor2_0, MergedJointAttnProcessor):
            return super().obstacle(layer, demands)
        return (
            f"has a {kind.__module__}.{kind.__name__}: merging in Stable Diffusion 3 needs diffusers'"
            " JointAttnProcessor2_0; set that one, or call remove_patch"
        )

    def noise(self, scheduler: Any) -> NoiseSchedule:
        return flow("flow")

    def project(self, attention: Any, tokens: Tensor, which: Which) -> Tensor:
        """Keys after the model's key norm, if it has one, or values."""
        return _keys(attention, tokens).flatten(2) if which == "keys" else attention.to_v(tokens)

    def merged(self, attention: Any, given: Kwargs, merge: MergedCall) -> Kwargs:
        tokens = given["hidden_states"]
        return given | {
            "hidden_states": merge.merge_queries(tokens),
            "merged_keys": merge.merge_keys(tokens),
            "log_weights": merge.log_weights,
            "widen": merge.widen,
        }

    def unmerge(self, output: Any, merge: MergedCall) -> Any:
        if isinstance(output, tuple):
            image, text = output
            return merge.unmerge(image), text
        return merge.unmerge(output)


class MergedJointAttnProcessor(StandIn):
    """`JointAttnProcessor2_0` whose keys and values come from merged tokens, with weights for them."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        merged_keys: Tensor | None = None,
        log_weights: Tensor | None = None,
        widen: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attend from `hidden_states` `[B, Q, C]` and the text to `merged_keys` `[B, K, C]` and the text.

        Args:
            attn: the multi-head attention.
            hidden_states: tokens that the image's queries are projected from.
            encoder_hidden_states: text tokens `[B, T, C]`, or None.
            attention_mask: ignored, as in the original.
            merged_keys: tokens that the image's keys and values are projected from; None calls the original.
            log_weights: `[B, K]` float32, added to the logits of the image's keys; None adds nothing.
            widen: add them in channels of the heads instead of in a mask.
        """
        if merged_keys is None:
            return self.original(attn, hidden_states, encoder_hidden_states, attention_mask)
        query = _normed(attn.norm_q, _heads(attn, attn.to_q(hidden_states)))
        key, value = _keys(attn, merged_keys), _heads(attn, attn.to_v(merged_keys))
        if encoder_hidden_states is not None:
            query, key, value = (
                torch.cat([image, text], dim=1)
                for image, text in zip((query, key, value), _text(attn, encoder_hidden_states), strict=True)
            )
            log_weights = None if log_weights is None else F.pad(log_weights, (0, encoder_hidden_states.shape[1]))
        attended = attend(query, key, value, log_weights, widen).flatten(2).to(query.dtype)
        image, text = attended.split([hidden_states.shape[1], attended.shape[1] - hidden_states.shape[1]], dim=1)
        image = attn.to_out[1](attn.to_out[0](image))
        if encoder_hidden_states is None:
            return image
        return image, text if attn.context_pre_only else attn.to_add_out(text)


def _heads(attn: Any, x: Tensor) -> Tensor:
    """Split `x` `[B, N, C]` into heads `[B, N, H, C / H]`."""
    return x.unflatten(2, (attn.heads, -1))


def _keys(attn: Any, tokens: Tensor) -> Tensor:
    return _normed(attn.norm_k, _heads(attn, attn.to_k(tokens)))


def _text(attn: Any, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of the text, from its own projections."""
    query, key, value = (_heads(attn, project(text)) for project in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj))
    return _normed(attn.norm_added_q, query), _normed(attn.norm_added_k, key), value


def _normed(norm: nn.Module | None, x: Tensor) -> Tensor:
    return x if norm is None else norm(x)
