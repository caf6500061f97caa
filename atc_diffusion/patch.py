"""Merging in a diffusers UNet, by forward hooks on its transformer blocks."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import FusedAttnProcessor2_0
from torch import nn

from atc_diffusion.config import ATCConfig, MergeConfig
from atc_diffusion.hooks import Args, BlockHooks, Kwargs, LayerSummary
from atc_diffusion.run import Run

Model = TypeVar("Model")

_PATCH = "_atc_diffusion"
_BLOCK_NAME = re.compile(
    r"((?P<side>down|up)_blocks\.(?P<level>\d+)|mid_block)\.attentions\.\d+\.transformer_blocks\.\d+"
)


def apply_patch(model: Model, config: MergeConfig | None = None, **options: Any) -> Model:
    """Merge similar tokens in the self-attention of a diffusers pipeline or UNet, from now on.

    The model is changed in place; patching again replaces the patch. Whatever was compiled with `torch.compile` is
    compiled again at its next call.

    Args:
        model: a pipeline that has a `unet`, or the UNet itself.
        config: an `ATCConfig` or `ToMeConfig`.
        options: fields of `ATCConfig`, in place of `config`: `apply_patch(pipe, r=0.6, linkage="average")`.

    Returns:
        `model`.

    Raises:
        ValueError: for a value that does not fit, both `config` and `options`, a model without a UNet, or a UNet
            without self-attention at the levels asked for. The model is then as it was.
    """
    if config is not None and options:
        raise ValueError(f"give either config or options, got both: {config!r} and {options!r}")
    if not isinstance(config, MergeConfig | None):
        raise ValueError(f"config must be an ATCConfig or ToMeConfig, got {config!r}")
    config = config if config is not None else _config(options)
    unet = _unet(model)
    blocks = _select(unet, config)
    remove_patch(unet)
    setattr(unet, _PATCH, _Patch(unet, config, blocks))
    return model


def remove_patch(model: Model) -> Model:
    """Undo `apply_patch`: outputs are again those of the model as it was, to the bit. Returns `model`."""
    unet = _unet(model)
    patch = _patch_of(unet)
    if patch is not None:
        patch.remove()
        delattr(unet, _PATCH)
    return model


@contextmanager
def patched(model: Model, config: MergeConfig | None = None, **options: Any) -> Iterator[Model]:
    """`apply_patch` for the length of a `with` block; what was there before is restored, after an exception too."""
    before = _patch_of(_unet(model))
    apply_patch(model, config, **options)
    try:
        yield model
    finally:
        remove_patch(model) if before is None else apply_patch(model, before.config)


@dataclass(frozen=True)
class Summary:
    """What a patch does and what its last denoising run did; prints as a table."""

    config: MergeConfig
    layers: tuple[LayerSummary, ...]

    def __str__(self) -> str:
        width = max(len(layer.name) for layer in self.layers)
        header = f"{'layer':{width}}  level  tokens    kept  clusterings"
        rows = (
            f"{layer.name:{width}}  {layer.downsample:>5}  {layer.tokens:>6}  {layer.kept:>6}  {layer.clusterings:>11}"
            for layer in self.layers
        )
        return "\n".join([str(self.config), header, *rows])


def summary(model: object) -> Summary:
    """What is patched in `model`, and what happened there in its last run.

    Raises:
        ValueError: if the model is not patched.
    """
    patch = _patch_of(_unet(model))
    if patch is None:
        raise ValueError(f"this {type(model).__name__} is not patched; call apply_patch first")
    return Summary(patch.config, tuple(block.summary() for block in patch.blocks))


def _config(options: Kwargs) -> ATCConfig:
    unknown = options.keys() - ATCConfig.__dataclass_fields__.keys()
    if unknown:
        raise ValueError(f"unknown option {min(unknown)!r}; ATCConfig has {', '.join(ATCConfig.__dataclass_fields__)}")
    return ATCConfig(**options)


def _unet(model: object) -> nn.Module:
    unet = getattr(model, "unet", model)
    unet = getattr(unet, "_orig_mod", unet)  # torch.compile's wrapper
    if not isinstance(unet, nn.Module) or not hasattr(unet, "down_blocks"):
        raise ValueError(f"{type(model).__name__} has no UNet; pass a pipeline that has one, or the UNet itself")
    return unet


def _patch_of(unet: nn.Module) -> "_Patch | None":
    return getattr(unet, _PATCH, None)


def _select(unet: nn.Module, config: MergeConfig) -> list[BlockHooks]:
    """The blocks at the levels that `config` asks for."""
    num_levels = len(cast(nn.ModuleList, unet.down_blocks))
    blocks = [
        BlockHooks(name, _downsample(match, num_levels), config)
        for name, module in unet.named_modules()
        if isinstance(module, BasicTransformerBlock) and not module.only_cross_attention
        if (match := _BLOCK_NAME.fullmatch(name))
    ]
    levels = sorted({block.downsample for block in blocks})
    if not levels:
        raise ValueError(f"{type(unet).__name__} has no transformer block with self-attention, so nothing to merge")
    wanted = _levels(config, levels)
    selected = [block for block in blocks if block.downsample in wanted]
    attentions: list[Any] = [unet.get_submodule(f"{block.name}.attn1") for block in selected]
    if config.merge == "keys_values" and any(isinstance(a.processor, FusedAttnProcessor2_0) for a in attentions):
        raise ValueError(
            "merge='keys_values' needs unfused projections; call unfuse_qkv_projections() on the UNet first"
        )
    return selected


def _levels(config: MergeConfig, levels: list[int]) -> list[int]:
    """Those of the `levels` that have self-attention, from the finest on, that `config` asks for."""
    there_are = f"the levels that have self-attention are {', '.join(map(str, levels))}"
    if isinstance(config.r, Mapping):
        missing = config.r.keys() - levels
        if missing:
            raise ValueError(f"r names level {min(missing)}, but {there_are}; use some of them")
        return list(config.r)
    coarsest = config.max_downsample or levels[0]
    if coarsest < levels[0]:
        raise ValueError(f"max_downsample={coarsest}, but {there_are}; use one of them, or None for the finest")
    return [level for level in levels if level <= coarsest]


def _downsample(match: re.Match[str], num_levels: int) -> int:
    """Downsampling factor of the level that a block's path names: 1 for `down_blocks.0` and the last up block."""
    if match["side"] is None:
        return 2 ** (num_levels - 1)  # mid_block
    level = int(match["level"])
    return 2 ** (level if match["side"] == "down" else num_levels - 1 - level)


class _Patch:
    """The hooks on one UNet. They are PyTorch's own, so a deep copy of the model has its own patch."""

    def __init__(self, unet: nn.Module, config: MergeConfig, blocks: list[BlockHooks]) -> None:
        self.config = config
        self.blocks = blocks
        self.run = Run(config)
        self.handles = [
            unet.register_forward_pre_hook(self._begin, with_kwargs=True),
            unet.register_forward_hook(self._end),
        ]
        for block in blocks:
            self.handles += block.attach(unet, self.run)
        _forget_compiled()

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        _forget_compiled()

    @torch.compiler.disable
    def _begin(self, unet: nn.Module, args: Args, kwargs: Kwargs) -> None:
        given = dict(zip(("sample", "timestep", "encoder_hidden_states"), args, strict=False)) | kwargs
        is_new = self.run.begin(given["sample"], given["timestep"], given["encoder_hidden_states"])
        for block in self.blocks:
            block.config = self.config.at(block.downsample, self.run.progress)
            if is_new:
                block.clusterings = torch.zeros((), dtype=torch.int64, device=given["sample"].device)

    @torch.compiler.disable
    def _end(self, unet: nn.Module, args: Args, output: Any) -> None:
        self.run.end()


def _forget_compiled() -> None:
    """torch.compile does not guard on forward hooks: without this, a compiled UNet would not notice them."""
    torch.compiler.reset()
