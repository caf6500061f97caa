"""The public functions: patch the networks of a model, report what was merged, and remove the patch."""

import logging
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from types import MethodType
from typing import Any, TypeVar

from torch import nn
from typing_extensions import Unpack

from atc_diffusion import attached
from atc_diffusion.adapters.layer import Layer, unwrapped
from atc_diffusion.adapters.lookup import family_of
from atc_diffusion.attached import Patch
from atc_diffusion.calls.reference import Reference
from atc_diffusion.config import MergeConfig
from atc_diffusion.methods import ATCConfig, ATCOptions
from atc_diffusion.report import RecordedMerge, Summary
from atc_diffusion.validation import did_you_mean
from atc_diffusion.vit import ViTConfig
from atc_diffusion.vit.hooks import ViTPatch

Model = TypeVar("Model")
Networks = dict[str, nn.Module]

DENOISERS = ("unet", "transformer")
SUPPORTED = (
    "Stable Diffusion 1, 2, XL, 3 and 3.5, PixArt, Flux.1 and Qwen-Image, ControlNets of these, Z-Image,"
    " and with a ViTConfig timm's ViTs"
)
# What to write where a call without arguments makes no configuration.
_CALLS = {"MergeConfig": "ATCConfig()", "ViTConfig": "ViTConfig(r=0.7)", "ATCConfig.paper": "ATCConfig.paper(r=0.4)"}

_logger = logging.getLogger("atc_diffusion")


def apply_patch(model: Model, config: MergeConfig | ViTConfig | None = None, **options: Unpack[ATCOptions]) -> Model:
    """Merge similar tokens in the self-attention of a diffusers pipeline, a network or a vision transformer.

    A pipeline's ControlNets are patched too. The model is changed in place; patching again replaces the patch. Networks
    that are built from it later (`ControlNetModel.from_unet`, `AnimateDiffPipeline`) are copies without the patch.
    Everything compiled with `torch.compile` is recompiled at its next call. What was patched is logged at level INFO
    by the logger "atc_diffusion".

    Args:
        model: a pipeline; a UNet, transformer or ControlNet; or timm's `VisionTransformer`.
        config: an `ATCConfig`, or the configuration of a baseline, such as `ToMeConfig`; for a vision transformer a
            `ViTConfig`.
        options: fields of `ATCConfig`, instead of `config`: `apply_patch(pipe, r=0.6, linkage="average")`.

    Returns:
        `model`.

    Raises:
        ValueError: for an invalid value, both `config` and `options`, a model without self-attention that can merge,
            an attention processor that is not supported, or if another thread or asyncio task is inside `patched` on
            the model. The model is left unchanged.
    """
    patches = _patches(model, config, options)
    attached.replace_patches(patches)
    _log(patches)
    return model


def remove_patch(model: Model) -> Model:
    """Undo `apply_patch`: restores the original, bit for bit. Returns `model`.

    Raises:
        ValueError: if another thread or asyncio task is inside `patched` on the model, or only a part of what was
            passed is patched, such as a network in an `nn.ModuleList`.
    """
    networks = find_networks(model).values()
    for network in networks:
        part = next(filter(attached.patch_of, network.modules()), network)
        if part is not network:
            raise ValueError(f"this {type(network).__name__} has a patched {type(part).__name__} in it; pass that")
    attached.replace_patches(dict.fromkeys(networks))
    return model


@contextmanager
def patched(
    model: Model, config: MergeConfig | ViTConfig | None = None, **options: Unpack[ATCOptions]
) -> Iterator[Model]:
    """Apply a patch inside a `with` block.

    Afterwards, even after an exception, every network has the patch that it had before, or none. Blocks may end in any
    order. Whoever calls a network sees its patch, so another thread or asyncio task may enter a block on the same
    network only with an equal configuration, and then both use one patch.

    Raises:
        ValueError: as `apply_patch`.
    """
    patches = _patches(model, config, options)
    block = attached.enter(patches)
    try:
        _log(patches)
        yield model
    finally:
        attached.leave(block)


def summary(model: object) -> Summary:
    """Report the patched layers of `model` and their last run.

    If its networks were patched one by one, `config` and `forecasts` are those of the first: of the denoiser, if it is
    patched.

    Raises:
        ValueError: if the model is not patched.
    """
    patches = _patches_of(model)
    layers = tuple(layer for patch in patches for layer in patch.summaries())
    return Summary(patches[0].config, layers, patches[0].forecasts())


def merge_maps(model: object) -> tuple[RecordedMerge, ...]:
    """The clusters of the last run, one entry for each layer and step, in order of use.

    Raises:
        ValueError: if the model is not patched with `record=True`, or is a vision transformer.
    """
    return tuple(merge for patch in _patches_of(model) for merge in patch.merges())


def _patches_of(model: object) -> list[Patch]:
    patches = [patch for network in find_networks(model).values() if (patch := attached.patch_of(network))]
    if not patches:
        raise ValueError(f"this {type(model).__name__} is not patched; call apply_patch first")
    return patches


def _patches(model: object, config: Any, options: ATCOptions) -> dict[nn.Module, Patch | None]:
    """For every network of `model` a patch that is not attached yet, or None where `config` selects nothing."""
    if config is not None and options:
        both = f"{config} and {options!r}"
        raise ValueError(
            f"give either config or options, got both: {both}; presets such as ATCConfig.fast take options"
        )
    networks = find_networks(model)
    patches = _make_patches(ATCConfig(**options) if config is None else config, networks, Reference(model))
    return {network: patches.get(name) for name, network in networks.items()}


def _log(patches: Mapping[nn.Module, Patch | None]) -> None:
    new = [patch for patch in patches.values() if patch is not None]
    _logger.info("%s: %s", new[0].config, "; ".join(map(str, new)))


def find_networks(model: object) -> Networks:
    """The networks of a model by the names that reports use: the denoiser first, then ControlNets."""
    if isinstance(model, nn.Module):
        return _unwrapped("", model)
    networks: Networks = {}
    for name in (*DENOISERS, "controlnet"):
        if isinstance(part := getattr(model, name, None), nn.Module):
            networks |= _unwrapped(name, part)
    if not networks.keys() & set(DENOISERS):
        raise ValueError(
            f"{type(model).__name__} has no {' or '.join(DENOISERS)}; pass a pipeline that has one, or the network"
        )
    return networks


def _unwrapped(name: str, network: nn.Module) -> Networks:
    """The networks within wrappers and MultiControlNets, however nested; each by its first name."""
    network = unwrapped(network)
    if not isinstance(nets := getattr(network, "nets", None), nn.ModuleList):
        return {name: network}
    found: dict[nn.Module, str] = {}
    for i, net in enumerate(nets):
        for path, inner in _unwrapped(f"{name}.nets.{i}".lstrip("."), net).items():
            found.setdefault(inner, path)
    return {path: inner for inner, path in found.items()}


def _make_patches(config: object, networks: Networks, pipeline: Reference) -> Mapping[str, Patch]:
    """A patch, not attached yet, for every network that `config` selects."""
    if isinstance(config, ViTConfig):
        return {name: ViTPatch(name, network, config) for name, network in networks.items()}
    if isinstance(config, MergeConfig):
        return _network_patches(config, networks, pipeline)
    raise ValueError(f"config must be a configuration, such as an ATCConfig, got {config!r}{_hint(config)}")


def _hint(config: object) -> str:
    """What may have been meant: the name of a preset, what a preset or a class returns, or a fraction."""
    if isinstance(config, str) and isinstance(vars(ATCConfig).get(config), classmethod):
        config = getattr(ATCConfig, config)
    if callable(config) and not isinstance(config, type | MethodType):
        return "; did you mean r=, as a function of progress?"
    if callable(config):
        name = getattr(config, "__qualname__", repr(config))
        return f"; did you mean {_CALLS.get(name, f'{name}()')}?"
    return did_you_mean(config, "r=")


def _network_patches(config: MergeConfig, networks: Networks, pipeline: Reference) -> Mapping[str, Patch]:
    """The first network must have self-attention that can merge, and decides at which levels.

    So a ControlNet is merged at the levels of the denoiser.
    """
    from atc_diffusion.merging import NetworkPatch  # loads torch's compiler, which takes as long as torch

    families = {name: family_of(network) for name, network in networks.items()}
    layers = {name: family.layers(networks[name]) if family else [] for name, family in families.items()}
    first = next(iter(networks))
    if not layers[first]:
        raise ValueError(
            f"{type(networks[first]).__name__} has no self-attention that can be merged; supported are {SUPPORTED}"
        )
    wanted = _levels(config, layers[first], {layer.level for each in layers.values() for layer in each})
    patches: dict[str, NetworkPatch] = {}
    for name, family in families.items():
        chosen = [layer for layer in layers[name] if layer.level in wanted]
        if family and chosen:
            denoiser = Reference(patches.get(first))
            patches[name] = NetworkPatch(name, networks[name], family, chosen, config, pipeline, denoiser)
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
