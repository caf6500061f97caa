"""The features by which tokens are compared."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from atc_diffusion.adapters import Family, Layer
from atc_diffusion.config import Features


def make_features(which: Features, tokens: Tensor, family: Family, layer: Layer, rotary: Any) -> Tensor:
    """Features `[B, N, D]` of `tokens` `[B, N, C]`, the input of a layer's attention or, as hidden states, its block's.

    Args:
        which: see `MergeConfig.features`.
        tokens: of the image, or of those items of a batch that are clustered.
        family: the adapter of the network.
        layer: whose tokens these are.
        rotary: the rotary embedding of the tokens, if the family has one.

    Raises:
        ValueError: if the projections that are needed have no weights yet.
    """
    if which == "hidden_states":
        return tokens
    _check_weights(layer)
    project = partial(family.features, layer.attention, tokens, rotary)
    if which == "keys_values":
        return torch.cat([_unit_deviation(project("keys")), _unit_deviation(project("values"))], dim=2)
    return project(which)


def _check_weights(layer: Layer) -> None:
    if any(map(_waits_for_weights, layer.attention.modules())):
        raise ValueError(
            f"the weights of {layer.name} are loaded only when it is called, after its tokens are compared;"
            " use features='hidden_states', or offload without its class in preload_module_classes"
        )


def _waits_for_weights(module: nn.Module) -> bool:
    """Whether accelerate has offloaded the module's own weights, and will not load them when it is called."""
    return not hasattr(module, "_hf_hook") and any(weight.is_meta for weight in module.parameters(recurse=False))


def _unit_deviation(x: Tensor) -> Tensor:
    """Each item of `x` `[B, N, C]` divided by its standard deviation."""
    return x / x.float().std(dim=(1, 2), keepdim=True).clamp(min=1e-12).to(x.dtype)
