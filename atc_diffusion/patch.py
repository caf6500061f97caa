"""The public functions: patch the networks of a model, report what was merged, and remove the patch."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import torch
from torch import nn

from atc_diffusion.adapters.vit import ViTPatch
from atc_diffusion.adapters.vit_config import ViTConfig
from atc_diffusion.config import MergeConfig
from atc_diffusion.find import find_networks, make_patches
from atc_diffusion.methods import ATCConfig, ATCOptions
from atc_diffusion.report import RecordedMerge, Summary
from atc_diffusion.validation import did_you_mean

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from atc_diffusion.network import NetworkPatch

Model = TypeVar("Model")
Patch: TypeAlias = "NetworkPatch | ViTPatch"

_PATCH = "_atc_diffusion"


def apply_patch(model: Model, config: MergeConfig | ViTConfig | None = None, **options: "Unpack[ATCOptions]") -> Model:
    """Merge similar tokens in the self-attention of a diffusers pipeline, a network or a vision transformer.

    A pipeline's ControlNets are patched too. The model is changed in place; patching again replaces the patch. Networks
    that are built from it later (`ControlNetModel.from_unet`, `AnimateDiffPipeline`) are copies without the patch.
    Everything compiled with `torch.compile` is recompiled at its next call.

    Args:
        model: a pipeline; a UNet, transformer or ControlNet; or timm's `VisionTransformer`.
        config: an `ATCConfig`, or the configuration of a baseline, such as `ToMeConfig`; for a vision transformer a
            `ViTConfig`.
        options: fields of `ATCConfig`, instead of `config`: `apply_patch(pipe, r=0.6, linkage="average")`.

    Returns:
        `model`.

    Raises:
        ValueError: for an invalid value, both `config` and `options`, a model without self-attention that can merge,
            or an attention processor that is not supported. The model is left unchanged.
    """
    config = _config(config, options)
    networks = find_networks(model)
    patches = _patches(networks, config)
    _detach(networks)
    _attach(networks, patches)
    return model


def remove_patch(model: Model) -> Model:
    """Undo `apply_patch`: restores the original, bit for bit. Returns `model`."""
    _detach(find_networks(model))
    return model


@contextmanager
def patched(
    model: Model, config: MergeConfig | ViTConfig | None = None, **options: "Unpack[ATCOptions]"
) -> Iterator[Model]:
    """Apply a patch inside a `with` block.

    Afterwards, even after an exception, every network has the patch that it had before, or none.
    """
    networks = find_networks(model)
    before = _attached(networks)
    apply_patch(model, config, **options)
    try:
        yield model
    finally:
        _detach(networks)
        _attach(networks, before)


def summary(model: object) -> Any:
    """Report the patched layers of `model` and their last run, as a `Summary` or a `ViTSummary`.

    Raises:
        ValueError: if the model is not patched.
    """
    patches = _patches_of_patched(model)
    if isinstance(patches[0], ViTPatch):
        return patches[0].summary()
    networks = [patch for patch in patches if not isinstance(patch, ViTPatch)]
    layers = tuple(layer for patch in networks for layer in patch.summaries())
    return Summary(networks[0].config, layers, networks[0].forecasts())


def merge_maps(model: object) -> tuple[RecordedMerge, ...]:
    """The clusters of the last run, one entry for each layer and step, in order of use.

    Raises:
        ValueError: if the model is not patched with `record=True`.
    """
    patches = [patch for patch in _patches_of_patched(model) if not isinstance(patch, ViTPatch)]
    if not patches or not patches[0].config.record:
        raise ValueError("the clusters of the last run were not recorded; patch with record=True")
    return tuple(merge for patch in patches for merge in patch.merges())


def _config(config: object, options: ATCOptions) -> MergeConfig | ViTConfig:
    if config is None:
        return ATCConfig(**options)
    if options:
        raise ValueError(f"give either config or options, got both: {config} and {options!r}")
    if isinstance(config, MergeConfig | ViTConfig):
        return config
    raise ValueError(f"config must be a configuration, such as an ATCConfig, got {config!r}{_hint(config)}")


def _hint(config: object) -> str:
    """What may have been meant: a fraction, the name of a preset, or what a preset or a class returns."""
    if isinstance(config, str) and hasattr(ATCConfig, config):
        return f"; did you mean ATCConfig.{config}()?"
    if callable(config):
        return f"; did you mean {getattr(config, '__qualname__', config)}()?"
    return did_you_mean(config, "r=")


def _patches(networks: dict[str, nn.Module], config: MergeConfig | ViTConfig) -> Mapping[str, Patch]:
    """A patch for every network that can be merged, not attached yet."""
    if isinstance(config, ViTConfig):
        return {name: ViTPatch(network, config) for name, network in networks.items()}
    return make_patches(networks, config)


def _attached(networks: dict[str, nn.Module]) -> "dict[str, Patch]":
    return {name: patch for name, network in networks.items() if (patch := getattr(network, _PATCH, None))}


def _attach(networks: dict[str, nn.Module], patches: "Mapping[str, Patch]") -> None:
    for name, patch in patches.items():
        patch.attach()
        setattr(networks[name], _PATCH, patch)
    _forget_compiled()


def _detach(networks: dict[str, nn.Module]) -> None:
    for name, patch in _attached(networks).items():
        patch.detach()
        delattr(networks[name], _PATCH)
        _forget_compiled()


def _patches_of_patched(model: object) -> list[Patch]:
    patches = list(_attached(find_networks(model)).values())
    if not patches:
        raise ValueError(f"this {type(model).__name__} is not patched; call apply_patch first")
    return patches


def _forget_compiled() -> None:
    """torch.compile does not guard on forward hooks: without this, a compiled network would not notice them."""
    torch.compiler.reset()
