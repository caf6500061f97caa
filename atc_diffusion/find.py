"""Finds the networks of a model that can be merged, and the self-attentions that a configuration selects."""

from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any

from torch import nn

from atc_diffusion.adapters import Layer
from atc_diffusion.adapters.lookup import family_of
from atc_diffusion.config import MergeConfig

if TYPE_CHECKING:
    from atc_diffusion.network import NetworkPatch

_DENOISERS = ("unet", "transformer")
_SUPPORTED = (
    "Stable Diffusion 1, 2, XL, 3 and 3.5, PixArt, Flux.1 and Qwen-Image, ControlNets of these, Z-Image,"
    " and with a ViTConfig timm's ViTs"
)


def find_networks(model: object) -> dict[str, nn.Module]:
    """The networks of a model by the names that reports use: the denoiser first, then ControlNets."""
    if isinstance(model, nn.Module):
        return dict(_unwrapped("", model))
    named = {name: getattr(model, name, None) for name in (*_DENOISERS, "controlnet")}
    networks = {
        path: network
        for name, part in named.items()
        if isinstance(part, nn.Module)
        for path, network in _unwrapped(name, part)
    }
    if not networks.keys() & set(_DENOISERS):
        raise ValueError(
            f"{type(model).__name__} has no {' or '.join(_DENOISERS)}; pass a pipeline that has one, or the network"
        )
    return networks


def _unwrapped(name: str, network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The networks within wrappers and MultiControlNets."""
    network = _innermost(network)
    if isinstance(nets := getattr(network, "nets", None), nn.ModuleList):
        for i, net in enumerate(nets):
            yield from _unwrapped(f"{name}.nets.{i}".lstrip("."), net)
    else:
        yield name, network


def _innermost(network: Any) -> nn.Module:
    """The network inside wrappers of torch.compile, PEFT and data parallelism, nested in any order."""
    if hasattr(network, "get_base_model"):
        return _innermost(network.get_base_model())
    for wrapper in ("_orig_mod", "module"):
        if isinstance(inner := getattr(network, wrapper, None), nn.Module):
            return _innermost(inner)
    return network


def make_patches(networks: dict[str, nn.Module], config: MergeConfig) -> "dict[str, NetworkPatch]":
    """A patch for every network with self-attention at the levels that `config` selects; the first must have some.

    The first network decides which levels these are, so that a ControlNet is merged at the levels of the denoiser.
    """
    from atc_diffusion.network import NetworkPatch  # loads torch's compiler, which takes as long as torch

    families = {name: family_of(network) for name, network in networks.items()}
    layers = {name: family.layers(networks[name]) if family else [] for name, family in families.items()}
    first = next(iter(networks))
    if not layers[first]:
        raise ValueError(
            f"{type(networks[first]).__name__} has no self-attention that can be merged; supported are {_SUPPORTED}"
        )
    wanted = _levels(config, layers[first], {layer.level for each in layers.values() for layer in each})
    patches: dict[str, NetworkPatch] = {}
    for name, family in families.items():
        chosen = [layer for layer in layers[name] if layer.level in wanted]
        if family and chosen:
            denoiser = patches[first].schedule if first in patches else None
            patches[name] = NetworkPatch(name, networks[name], family, chosen, config, denoiser)
    return patches


def _levels(config: MergeConfig, layers: list[Layer], existing: set[int]) -> Collection[int]:
    """The levels that `config` selects, given the denoiser's `layers` and the levels `existing` in any network."""
    there_are = f"the levels that have self-attention are {', '.join(map(str, sorted(existing)))}"
    if config.named_levels is not None:
        if missing := config.named_levels - existing:
            raise ValueError(f"level {min(missing)} was asked for, but {there_are}; use some of them")
        return config.named_levels
    if config.levels == "all":
        return existing
    return _costly_levels(layers) if config.levels == "costly" else {min(layer.level for layer in layers)}


def _costly_levels(layers: list[Layer]) -> list[int]:
    """Levels whose attention costs at least half as much as the finest level's, counting N^2 C operations a layer."""
    costs: dict[int, float] = {}
    for layer in layers:
        costs[layer.level] = costs.get(layer.level, 0) + layer.channels / layer.level**4
    return [level for level, cost in costs.items() if cost >= costs[min(costs)] / 2]
