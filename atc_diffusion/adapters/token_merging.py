"""Attention whose tokens merge before they are projected: what UNets, PixArt and Stable Diffusion 3 have in common."""

from abc import abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from atc_diffusion.adapters import Args, Family, Kwargs
from atc_diffusion.adapters.layer import Cut, ImageSlice, MergedCall, Which


class TokenFamily(Family):
    """A family that merges tokens, and projects each cluster's mean."""

    @abstractmethod
    def project(self, attention: Any, tokens: Tensor, which: Which) -> Tensor:
        """Keys or values `[B, N, C]` that the attention makes of `tokens` `[B, N, C]`."""

    @abstractmethod
    def merged(self, attention: Any, given: Kwargs, merge: MergedCall) -> Kwargs:
        """The arguments of the attention with its tokens merged and, if `merge.weigh`, weighted in the softmax."""

    def merge(self, attention: Any, args: Args, kwargs: Kwargs, image: ImageSlice, cut: Cut) -> tuple[Args, Kwargs]:
        given = _named(args, kwargs)
        merge = cut(partial(self._picked, attention, given["hidden_states"]))
        if merge.queries is None and merge.keys is None:
            return args, kwargs
        merged = self.merged(attention, given, merge)
        return (merged.pop("hidden_states"),), merged  # by place, where hooks of others look for it

    def unmerge(self, output: Any, merge: MergedCall) -> Any:
        return merge.unmerge(output)

    def _picked(self, attention: Any, tokens: Tensor, which: Which, pick: Callable[[Tensor], Tensor]) -> Tensor:
        if not tokens.is_meta:
            _check_weights(attention)
        return self.project(attention, pick(tokens), which)


def _named(args: Args, kwargs: Kwargs) -> Kwargs:
    """The arguments of an attention, by name."""
    names = ("hidden_states", "encoder_hidden_states", "attention_mask")
    return {names[i]: value for i, value in enumerate(args)} | kwargs


def _check_weights(attention: nn.Module) -> None:
    if any(map(_waits_for_weights, attention.modules())):
        raise ValueError(
            f"the weights of an {type(attention).__name__} are loaded only when it is called, after its tokens are"
            " compared; use features='hidden_states', or offload without its class in preload_module_classes"
        )


def _waits_for_weights(module: nn.Module) -> bool:
    """Whether accelerate has offloaded the module's own weights, and will not load them when it is called."""
    return not hasattr(module, "_hf_hook") and any(weight.is_meta for weight in module.parameters(recurse=False))
