"""Which networks of a model can be merged, and which of their self-attentions a configuration asks for."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import nn

from atc_diffusion.adapters import Layer
from atc_diffusion.adapters.lookup import family_of
from atc_diffusion.config import MergeConfig

if TYPE_CHECKING:
    from atc_diffusion.network import NetworkPatch

_DENOISERS = ("unet", "transformer")
_SUPPORTED = "Stable Diffusion 1, 2, XL, 3 and 3.5, PixArt, ControlNets of these, and with a ViTConfig timm's ViTs"


def find_networks(model: object) -> dict[str, nn.Module]:
    """The denoising networks of a model, by their names in reports; first the one that denoises."""
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


def _unwrapped(name: str, network: Any) -> Iterator[tuple[str, nn.Module]]:
    """The diffusers models within torch.compile's, PEFT's and parallel wrappers, and within MultiControlNets."""
    for wrapper in ("_orig_mod", "module"):
        network = getattr(network, wrapper, network)
    if hasattr(network, "get_base_model"):
        network = network.get_base_model()
    if isinstance(nets := getattr(network, "nets", None), nn.ModuleList):
        for i, net in enumerate(nets):
            yield from _unwrapped(f"{name}.nets.{i}".lstrip("."), net)
    else:
        yield name, network


def make_patches(networks: dict[str, nn.Module], config: MergeConfig) -> "dict[str, NetworkPatch]":
    """A patch for every network that has self-attention; of a pipeline the first must."""
    from atc_diffusion.network import NetworkPatch  # loads torch's compiler, which takes as long as torch

    patches = {}
    for name, network in networks.items():
        family = family_of(network)
        layers = family.layers(network) if family else []
        if family and layers:
            patches[name] = NetworkPatch(name, network, family, _select(layers, config), config)
        elif not patches:
            raise ValueError(
                f"{type(network).__name__} has no self-attention that can be merged; supported are {_SUPPORTED}"
            )
    return patches


def _select(layers: list[Layer], config: MergeConfig) -> list[Layer]:
    """Those at the levels that `config` asks for."""
    wanted = _levels(config, layers)
    return [layer for layer in layers if layer.level in wanted]


def _levels(config: MergeConfig, layers: list[Layer]) -> list[int]:
    """Those, from the finest on, that `config` asks for."""
    levels = sorted({layer.level for layer in layers})
    there_are = f"the levels that have self-attention are {', '.join(map(str, levels))}"
    if config.levels is not None:
        if missing := config.levels - set(levels):
            raise ValueError(f"a share is given for level {min(missing)}, but {there_are}; use some of them")
        return list(config.levels)
    if isinstance(config.max_downsample, str):
        return _costly_levels(layers)
    coarsest = config.max_downsample or levels[0]
    if coarsest < levels[0]:
        raise ValueError(f"max_downsample={coarsest}, but {there_are}; use one of them, or None for the finest")
    return [level for level in levels if level <= coarsest]


def _costly_levels(layers: list[Layer]) -> list[int]:
    """Those whose attention costs at least half as much as the finest's; N^2 C, of N tokens by the level's grid."""
    costs: dict[int, float] = {}
    for layer in layers:
        costs[layer.level] = costs.get(layer.level, 0) + layer.channels / layer.level**4
    return [level for level, cost in costs.items() if cost >= costs[min(costs)] / 2]
