"""Attention of rotary transformers with merged keys: what Flux, Qwen-Image and Z-Image have in common.

A rotary embedding turns every token by its own place, so tokens cannot merge before they are projected. Keys can merge
after the rotation: the means of a cluster's keys and values stand for its members, and all queries attend to them.
Diffusers' processors offer no hook there, but they all call `dispatch_attention_fn`: their own code runs, with a
function of ours by that name.
"""

import threading
from collections.abc import Callable, Mapping
from functools import partial
from types import FunctionType
from typing import Any, NamedTuple

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry, dispatch_attention_fn
from torch import Tensor
from torch.nn import functional as F

from atc_diffusion.adapters import Args, Family, ImageInput, Kwargs, StandIn, argument, first, like, without
from atc_diffusion.adapters.layer import Cut, Demands, ImageSlice, Layer, MergedCall, Which
from atc_diffusion.adapters.noise import NoiseSchedule, flow
from atc_diffusion.adapters.obstacles import source
from atc_diffusion.adapters.weights import aligned, wider_heads

# By name: which of them exist depends on the version of diffusers.
_ADD_MASKS = {"native", "_native_cudnn", "_native_efficient", "_native_math", "flex", "xformers"}
_REFUSE_MASKS = {"_native_flash", "flash", "flash_hub", "_flash_3", "_flash_3_hub", "aiter_fa2_hub"}

PACK = 2  # pipelines of packed latents make one token of two by two


class _Pending(NamedTuple):
    """How the attention that a thread is about to compute merges.

    Attributes:
        image: where the image's tokens are.
        cut: tells what merges.
        masks_text: whether a mask is the processor's own, of text and padding.
    """

    image: ImageSlice
    cut: Cut
    masks_text: bool


class _Slot:
    pending: _Pending | None = None


class _Thread(threading.local):
    """A thread's `_Slot`. PyTorch does not trace assignments to a `threading.local` itself in all versions."""

    def __init__(self) -> None:
        self.slot = _Slot()


_thread = _Thread()


def with_merged_keys(processor: type) -> Callable[..., Any]:
    """The `__call__` of a class of diffusers, whose `dispatch_attention_fn` is `_attend_to_clusters`."""
    call: Any = processor.__call__
    # Without `__name__`, torch.compile looks names up in this dictionary rather than in the module that it names.
    names = {name: value for name, value in call.__globals__.items() if name != "__name__"}
    names["dispatch_attention_fn"] = _attend_to_clusters
    return FunctionType(call.__code__, names, call.__name__, call.__defaults__, call.__closure__)


class RotaryFamily(Family):
    """A family whose keys merge within the processor.

    Attributes:
        processor: diffusers' class.
        stand_in: ours, whose `__call__` is made by `with_merged_keys`.
        masks_text: whether the processor masks text or padding; otherwise merged keys take no mask.
    """

    projects_all = True
    processor: type
    stand_in: type[StandIn]
    masks_text = True

    def stand_ins(self, wider_heads: bool) -> Mapping[type, type[StandIn]]:
        return {self.processor: self.stand_in}

    def obstacle(self, layer: Layer, demands: Demands) -> str | None:
        processor = layer.attention.processor
        kind = type(processor)
        if kind not in (self.processor, self.stand_in):
            return (
                f"has a {kind.__module__}.{kind.__name__}: merging here needs diffusers' {self.processor.__name__}; set"
                " that one, or call remove_patch"
            )
        if demands.fewer_queries:
            return (
                "rotates tokens by their places, so only its keys can merge; use r=1 and a share for r_keys, such as"
                " r=1, r_keys=0.25, or ATCConfig.fast()"
            )
        return super().obstacle(layer, demands) or self._foreign_attention() or _unsuitable_backend(processor)

    def _foreign_attention(self) -> str | None:
        """What to say if the function that stands aside is not diffusers' own."""
        call: Any = self.processor.__call__
        function = call.__globals__["dispatch_attention_fn"]
        if function is dispatch_attention_fn:
            return None
        return (
            f"attends by code of {source(function)}, not by diffusers' dispatch_attention_fn; undo that, or"
            " call remove_patch"
        )

    def noise(self, scheduler: Any) -> NoiseSchedule:
        return flow("flow")

    def output(self, returned: Any, latents: Tensor) -> Tensor:
        """Of the tokens `[B, S, C]` that were returned, those of the image."""
        return returned[0][:, : latents.shape[2]].mT

    def returned(self, template: Any, output: Tensor) -> Any:
        """Tokens of reference images, which pipelines ignore, stay as they were in `template`."""
        before = template[0]
        return like(template, torch.cat([output.mT.to(before.dtype), before[:, output.shape[2] :]], dim=1))

    def tokens(self, args: Args, kwargs: Kwargs, image: ImageSlice) -> Tensor:
        return image.of(first(args, kwargs), dim=1)

    def merge(self, attention: Any, args: Args, kwargs: Kwargs, image: ImageSlice, cut: Cut) -> tuple[Args, Kwargs]:
        _thread.slot.pending = _Pending(image, cut, self.masks_text)
        return args, kwargs

    def unmerge(self, output: Any, merge: MergedCall) -> Any:
        return output


def packed_image(given: Kwargs, grid: tuple[int, int]) -> ImageInput:
    """What a network was called with whose latents come as tokens `[B, N, C]`, on a scale of timesteps from 1 to 0.

    The tokens of reference images follow those of the image, which are on a `grid` of this height and width.
    """
    height, width = grid
    tokens, timestep = argument(given, "hidden_states"), argument(given, "timestep")
    num_tokens = height * width
    others = without(given, "hidden_states", "timestep") | {"references": tokens[:, num_tokens:]}
    size = (height * PACK, width * PACK)
    return ImageInput.of(tokens[:, :num_tokens].mT, size, timestep * 1000, others, tokens.shape[1] - num_tokens)


def _merge_keys(x: Tensor, merge: MergedCall) -> Tensor:
    """Keys or values `[B, S - N + K, H, D]` of the sequence `x` `[B, S, H, D]`, which has the image's `N` in it."""
    before, image, after = merge.image.split(x, dim=1)
    return torch.cat([before, merge.merge_keys(image.flatten(2)).unflatten(2, x.shape[2:]), after], dim=1)


def _log_weights(merge: MergedCall, length: int) -> Tensor | None:
    """What is added to the logits of merged keys, `[B, S - N + K]`, of a sequence of `length` `S`; None: nothing."""
    logs, image = merge.log_weights, merge.image
    return None if logs is None else F.pad(logs, (length - image.num_tokens - image.after, image.after))


def _merge_mask(mask: Tensor, merge: MergedCall) -> Tensor:
    """The mask `[B, 1, 1, S - N + K]` of merged keys, of a `mask` `[B, 1, 1, S]` that shows all of the image."""
    before, image, after = merge.image.split(mask, dim=3)
    return torch.cat([before, image[..., : merge.kept[1]], after], dim=3)


def _unsuitable_backend(processor: Any) -> str | None:
    """What to say of attention through a backend, or over several devices, where keys cannot merge; None: they can."""
    if getattr(processor, "_parallel_config", None) is not None:  # which diffusers has since 0.36
        return (
            "shares its sequence between devices, which merging cannot do; load the model without enable_parallelism,"
            " or remove_patch"
        )
    if (backend := _name(processor._attention_backend)) not in _ADD_MASKS | _REFUSE_MASKS:
        known = ", ".join(sorted(_ADD_MASKS | _REFUSE_MASKS))
        return (
            f"attends through the backend {backend!r}, which is not known to weigh merged keys; call"
            f" set_attention_backend with one of {known}, or remove_patch"
        )
    return None


def _name(backend: AttentionBackendName | None) -> str:
    """The name of a processor's backend, or of diffusers' present one."""
    backend = backend or _AttentionBackendRegistry.get_active_backend()[0]
    return backend.value if isinstance(backend, AttentionBackendName) else backend


def _attend_to_clusters(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options: Any
) -> Tensor:
    """Attention `[B, S, H, D]` to keys and values that merge as is pending; takes what `dispatch_attention_fn` takes.

    Args:
        query: `[B, S, H, D]`, normed and rotated, as is `key`.
        key: `[B, S, H, D]`.
        value: `[B, S, H, D]`.
        attn_mask: bool `[B, 1, 1, S]`: which keys are attended to; all of the image are.
        options: such as the backend.
    """
    pending, _thread.slot.pending = _thread.slot.pending, None  # one attention has one of these calls
    merge = pending.cut(partial(_picked, pending.image, key, value)) if pending else None
    if pending is None or merge is None or merge.keys is None:
        return dispatch_attention_fn(query, key, value, attn_mask=attn_mask, **options)
    if attn_mask is not None and not pending.masks_text:
        raise ValueError("merging takes no attention_mask here; leave it out, or call remove_patch")
    weights = _log_weights(merge, key.shape[1])
    key, value = _merge_keys(key, merge), _merge_keys(value, merge)
    mask, width = None if attn_mask is None else _merge_mask(attn_mask.bool(), merge), query.shape[-1]
    if weights is not None and (merge.widen or _name(options.get("backend")) not in _ADD_MASKS):
        query, key, value = wider_heads(query, key, value, weights)
        options |= {"scale": width**-0.5}
    elif weights is not None:
        added = weights.to(query.dtype)[:, None, None]
        mask = aligned(added if mask is None else added.masked_fill(~mask, -torch.inf))
    return dispatch_attention_fn(query, key, value, attn_mask=mask, **options)[..., :width]


def _picked(image: ImageSlice, key: Tensor, value: Tensor, which: Which, pick: Callable[[Tensor], Tensor]) -> Tensor:
    return pick(image.of(key if which == "keys" else value, dim=1).flatten(2))
