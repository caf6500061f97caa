"""Attention of rotary transformers with merged keys: what Flux, Qwen-Image and Z-Image have in common.

A rotary embedding turns every token by its own place, so tokens cannot merge before they are projected. Keys can merge
after the rotation: the means of a cluster's keys and values stand for its members, and all queries attend to them.
Diffusers' processors offer no hook there, so one of ours stands in that has the original inside.
"""

from typing import Any

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry, dispatch_attention_fn
from torch import Tensor
from torch.nn import functional as F

from atc_diffusion.adapters import Args, Family, ImageInput, Kwargs, Layer, Merge, Place, first
from atc_diffusion.adapters.forward import check_forward
from atc_diffusion.adapters.weights import aligned, wider_heads

# By name: which of them exist depends on the version of diffusers.
_ADD_MASKS = {"native", "_native_cudnn", "_native_efficient", "_native_math", "flex", "xformers"}
_REFUSE_MASKS = {"_native_flash", "flash", "flash_hub", "_flash_3", "_flash_3_hub", "aiter_fa2_hub"}

PACK = 2  # pipelines of packed latents make one token of two by two


class MergedProcessor:
    """A processor that merges keys where it is given a `merge` of some, and otherwise leaves all to the original."""

    def __init__(self, original: Any) -> None:
        self.original = original

    @property
    def _attention_backend(self) -> AttentionBackendName | None:
        """What diffusers' `set_attention_backend` has set, by the name that it uses."""
        return self.original._attention_backend

    @_attention_backend.setter
    def _attention_backend(self, backend: AttentionBackendName | None) -> None:
        self.original._attention_backend = backend

    @property
    def _parallel_config(self) -> Any:
        return self.original._parallel_config

    @_parallel_config.setter
    def _parallel_config(self, config: Any) -> None:
        self.original._parallel_config = config

    def attend(self, query: Tensor, key: Tensor, value: Tensor, merge: Merge, mask: Tensor | None = None) -> Tensor:
        """Attention `[B, S, C]` of queries `[B, S, H, D]` to merged keys and values, made of `[B, S, H, D]`.

        Args:
            query: normed and rotated.
            key: normed and rotated.
            value: of the same sequence as `key`.
            merge: how keys and values merge.
            mask: bool `[B, 1, 1, S]`: which keys are attended to; all of the image are.
        """
        weights = log_weights(merge, key.shape[1])
        key, value = merge_keys(key, merge), merge_keys(value, merge)
        mask = None if mask is None else _merge_mask(mask, merge)
        widen = merge.widen or _backend(self) not in _ADD_MASKS
        attend = _attend_with_wider_heads if widen else _attend_with_mask
        return attend(query, key, value, weights, mask, self._attention_backend).flatten(2).to(query.dtype)


class RotaryFamily(Family):
    """A family whose keys merge within the processor.

    Attributes:
        processor: diffusers' class.
        merged_processor: ours, which stands in.
    """

    projects_all = True
    processor: type
    merged_processor: type[MergedProcessor]

    def attach(self, layer: Layer, widen: bool) -> None:
        attn: Any = layer.attention
        if type(attn.processor) is self.processor:
            attn.processor = self.merged_processor(attn.processor)

    def detach(self, layer: Layer) -> None:
        attn: Any = layer.attention
        if isinstance(attn.processor, self.merged_processor):
            attn.processor = attn.processor.original

    def check(self, layer: Layer, all_queries: bool, keys_apart: bool, widen: bool) -> None:
        check_forward(layer)
        processor = layer.attention.processor
        kind = type(processor)
        if kind not in (self.processor, self.merged_processor):
            raise ValueError(
                f"{layer.name} has a {kind.__module__}.{kind.__name__}: merging here needs diffusers'"
                f" {self.processor.__name__}; set that one, or call remove_patch"
            )
        if not all_queries:
            raise ValueError(
                f"{layer.name} rotates tokens by their places, so only its keys can merge; use r=1 and a share for"
                " r_keys, such as r=1, r_keys=0.25, or ATCConfig.fast()"
            )
        _check_backend(layer, processor)

    def tokens(self, args: Args, kwargs: Kwargs, place: Place) -> Tensor:
        return place.of(first(args, kwargs), dim=1)

    def merge(self, layer: Layer, args: Args, kwargs: Kwargs, merge: Merge) -> tuple[Args, Kwargs]:
        return args, kwargs if merge.keys is None else kwargs | {"merge": merge}

    def unmerge(self, output: Any, merge: Merge) -> Any:
        return output


def packed_image(given: Kwargs, grid: tuple[int, int]) -> ImageInput:
    """What a network was called with whose latents come as tokens `[B, N, C]`, on a scale of timesteps from 1 to 0.

    The tokens of reference images follow those of the image, which are on a `grid` of this height and width.
    """
    height, width = grid
    others = dict(given)
    tokens, timestep = others.pop("hidden_states"), others.pop("timestep")
    num_tokens = height * width
    others["references"] = tokens[:, num_tokens:]
    size = (height * PACK, width * PACK)
    return ImageInput(tokens[:, :num_tokens].mT, size, timestep * 1000, others, tokens.shape[1] - num_tokens)


def merge_keys(x: Tensor, merge: Merge) -> Tensor:
    """Keys or values `[B, S - N + K, H, D]` of the sequence `x` `[B, S, H, D]`, which has the image's `N` in it."""
    before, image, after = merge.place.split(x, dim=1)
    return torch.cat([before, merge.merge_keys(image.flatten(2)).unflatten(2, x.shape[2:]), after], dim=1)


def log_weights(merge: Merge, length: int) -> Tensor | None:
    """What is added to the logits of merged keys, `[B, S - N + K]`, of a sequence of `length` `S`; None: nothing."""
    logs, after = merge.log_weights, merge.place.after
    return None if logs is None else F.pad(logs, (length - merge.num_tokens - after, after))


def _merge_mask(mask: Tensor, merge: Merge) -> Tensor:
    """The mask `[B, 1, 1, S - N + K]` of merged keys, of a `mask` `[B, 1, 1, S]` that shows all of the image."""
    before, image, after = merge.place.split(mask, dim=3)
    return torch.cat([before, image[..., : merge.kept[1]], after], dim=3)


def _check_backend(layer: Layer, processor: Any) -> None:
    """Raise ValueError if the attention goes through a backend, or over several devices, where keys cannot merge."""
    if processor._parallel_config is not None:
        raise ValueError(
            f"{layer.name} shares its sequence between devices, which merging cannot do; load the model without"
            " enable_parallelism, or remove_patch"
        )
    if (backend := _backend(processor)) not in _ADD_MASKS | _REFUSE_MASKS:
        known = ", ".join(sorted(_ADD_MASKS | _REFUSE_MASKS))
        raise ValueError(
            f"{layer.name} attends through the backend {backend!r}, which is not known to weigh merged keys; call"
            f" set_attention_backend with one of {known}, or remove_patch"
        )


def _backend(processor: Any) -> str:
    """The name of the backend that diffusers sends a processor's attention to."""
    backend = processor._attention_backend or _AttentionBackendRegistry.get_active_backend()[0]
    return backend.value if isinstance(backend, AttentionBackendName) else backend


def _attend_with_mask(
    query: Tensor, key: Tensor, value: Tensor, weights: Tensor | None, mask: Tensor | None, backend: Any
) -> Tensor:
    """`[B, S, H, D]`; log weights `[B, K]` go into an additive mask."""
    if weights is not None:
        added = weights[:, None, None].to(query.dtype)
        mask = aligned(added if mask is None else added.masked_fill(~mask, -torch.inf))
    return dispatch_attention_fn(query, key, value, attn_mask=mask, backend=backend)


def _attend_with_wider_heads(
    query: Tensor, key: Tensor, value: Tensor, weights: Tensor | None, mask: Tensor | None, backend: Any
) -> Tensor:
    """`[B, S, H, D]`; log weights `[B, K]` go into channels of the heads."""
    width = query.shape[-1]
    if weights is not None:
        query, key, value = wider_heads(query, key, value, weights)
    attended = dispatch_attention_fn(query, key, value, attn_mask=mask, scale=width**-0.5, backend=backend)
    return attended[..., :width]
