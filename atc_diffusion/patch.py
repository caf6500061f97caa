"""Merging in a diffusers UNet, by forward hooks on its transformer blocks."""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from atc_diffusion.config import ATCConfig, MergeConfig
from atc_diffusion.merge_map import MergeMap
from atc_diffusion.run import Run

Model = TypeVar("Model")
Args = tuple[Any, ...]
Kwargs = dict[str, Any]

_PATCH = "_atc_diffusion"
_MASKED = -1e4  # as good as -inf, and finite in float16
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
    try:
        yield apply_patch(model, config, **options)
    finally:
        remove_patch(model) if before is None else apply_patch(model, before.config)


@dataclass(frozen=True)
class LayerSummary:
    """One patched block: its name, the level's downsampling factor, and what its last run did."""

    name: str
    downsample: int
    tokens: int
    kept: int
    clusterings: int


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


def _select(unet: nn.Module, config: MergeConfig) -> "list[_Block]":
    """The blocks at the levels that `config` asks for."""
    num_levels = len(cast(nn.ModuleList, unet.down_blocks))
    blocks = [
        _Block(name, _downsample(match, num_levels), config)
        for name, module in unet.named_modules()
        if isinstance(module, BasicTransformerBlock) and not module.only_cross_attention
        if (match := _BLOCK_NAME.fullmatch(name))
    ]
    levels = sorted({block.downsample for block in blocks})
    if not levels:
        raise ValueError(f"{type(unet).__name__} has no transformer block with self-attention, so nothing to merge")
    coarsest = config.max_downsample or levels[0]
    if coarsest < levels[0]:
        raise ValueError(
            f"max_downsample={coarsest}, but the levels that have self-attention are {', '.join(map(str, levels))}; "
            "use one of them, or None for the finest"
        )
    return [block for block in blocks if block.downsample <= coarsest]


def _downsample(match: re.Match[str], num_levels: int) -> int:
    """Downsampling factor of the level that a block's path names: 1 for `down_blocks.0` and the last up block."""
    if match["side"] is None:
        return 2 ** (num_levels - 1)  # mid_block
    level = int(match["level"])
    return 2 ** (level if match["side"] == "down" else num_levels - 1 - level)


class _Patch:
    """The hooks on one UNet. They are PyTorch's own, so a deep copy of the model has its own patch."""

    def __init__(self, unet: nn.Module, config: MergeConfig, blocks: "list[_Block]") -> None:
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
        names = ("sample", "timestep", "encoder_hidden_states")
        sample, timestep, text = (kwargs[name] if name in kwargs else args[i] for i, name in enumerate(names))
        if self.run.begin(sample, timestep, text):
            for block in self.blocks:
                block.clusterings = torch.zeros((), dtype=torch.int64, device=sample.device)

    @torch.compiler.disable
    def _end(self, unet: nn.Module, args: Args, output: Any) -> None:
        self.run.end()


def _forget_compiled() -> None:
    """torch.compile does not guard on forward hooks: without this, a compiled UNet would not notice them."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


class _Block:
    """One transformer block: groups its tokens, and merges them around its modules."""

    def __init__(self, name: str, downsample: int, config: MergeConfig) -> None:
        self.name = name
        self.downsample = downsample
        self.config = config
        self.tokens = self.kept = 0
        self.clusterings = torch.tensor(0)
        self.grid = (0, 0)
        self.hidden_states: Tensor | None = None
        self.merge_map: MergeMap | None = None  # None: nothing to merge

    def attach(self, unet: nn.Module, run: Run) -> list[RemovableHandle]:
        self.run = run
        block: Any = unet.get_submodule(self.name)
        transformer = unet.get_submodule(self.name.partition(".transformer_blocks.")[0])
        around = {"self_attention": block.attn1, "cross_attention": block.attn2, "mlp": block.ff}
        return [
            transformer.register_forward_pre_hook(self._see_grid, with_kwargs=True),
            block.register_forward_pre_hook(self._see_hidden_states, with_kwargs=True),
            block.attn1.register_forward_pre_hook(self._group, with_kwargs=True),
            *(handle for name in self.config.modules for handle in self._attach_merge(name, around[name])),
            block.register_forward_hook(self._forget),
        ]

    def _attach_merge(self, name: str, module: nn.Module) -> list[RemovableHandle]:
        if name == "self_attention" and self.config.merge == "keys_values":
            return [module.register_forward_pre_hook(self._merge_keys_values, with_kwargs=True)]
        merge = self._merge_self_attention if name == "self_attention" else self._merge
        return [
            module.register_forward_pre_hook(merge, with_kwargs=True),
            module.register_forward_hook(self._unmerge),
        ]

    def summary(self) -> LayerSummary:
        return LayerSummary(self.name, self.downsample, self.tokens, self.kept, int(self.clusterings))

    def _see_grid(self, transformer: nn.Module, args: Args, kwargs: Kwargs) -> None:
        height, width = _first(args, kwargs).shape[-2:]
        self.grid = (height, width)

    def _see_hidden_states(self, block: nn.Module, args: Args, kwargs: Kwargs) -> None:
        self.hidden_states, self.merge_map = _first(args, kwargs), None

    def _group(self, attn: nn.Module, args: Args, kwargs: Kwargs) -> None:
        hidden_states = _first(args, kwargs)
        self.tokens = hidden_states.shape[1]
        self.kept = self.config.num_clusters(self.tokens)
        if self.kept == self.tokens:
            return
        key = str(self.downsample) if self.config.share_layers else self.name
        if key not in self.run.merge_maps:
            with torch.no_grad():
                self.run.merge_maps[key] = self._merge_map(self._features(attn, hidden_states))
            self.clusterings = self.clusterings + 1
        self.merge_map = self.run.merge_maps[key]

    def _merge_map(self, features: Tensor) -> MergeMap:
        """Group the tokens `[B, N, C]`, those of the guidance's parts by all their features side by side."""
        parts = features.chunk(self.run.guidance_parts)
        return self.config.merge_map(torch.cat(parts, dim=2), self.grid, self.run.timestep).repeat(len(parts))

    def _features(self, attn: Any, hidden_states: Tensor) -> Tensor:
        """What tokens are compared by, `[B, N, C]`."""
        if self.config.features == "hidden_states":
            return cast(Tensor, self.hidden_states)
        projections = {"keys": [attn.to_k], "values": [attn.to_v], "keys_values": [attn.to_k, attn.to_v]}
        features = [project(hidden_states) for project in projections[self.config.features]]
        return features[0] if len(features) == 1 else torch.cat([_unit_deviation(x) for x in features], dim=2)

    def _merge(self, module: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        if self.merge_map is None:
            return args, kwargs
        return (self.merge_map.merge(args[0]), *args[1:]), kwargs

    def _merge_self_attention(self, attn: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        return self._merge(attn, args, self._weigh(kwargs, args[0].dtype))

    def _merge_keys_values(self, attn: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        if self.merge_map is None:
            return args, kwargs
        merged = {"encoder_hidden_states": self.merge_map.merge(args[0])}
        return args, self._weigh(kwargs, args[0].dtype) | merged

    def _weigh(self, kwargs: Kwargs, dtype: torch.dtype) -> Kwargs:
        """Add the logarithms `[B, 1, K]` of the clusters' weights to the attention mask (Bolya et al. 2023, Eq. 1).

        A mask `[B, 1, N]` that is there already gives every token the weight exp(mask).
        """
        mask = kwargs.get("attention_mask")
        if self.merge_map is None or (mask is None and not self.config.proportional_attention):
            return kwargs
        weights = torch.ones(()) if mask is None else self.merge_map.merge(mask.float().exp().mT).mT
        if self.config.proportional_attention:
            weights = weights * self.merge_map.sizes[:, None, :]
        return kwargs | {"attention_mask": weights.log().clamp(min=_MASKED).to(dtype)}

    def _unmerge(self, module: nn.Module, args: Args, output: Tensor) -> Tensor:
        return output if self.merge_map is None else self.merge_map.unmerge(output)

    def _forget(self, block: nn.Module, args: Args, output: Tensor) -> None:
        self.hidden_states = self.merge_map = None


def _first(args: Args, kwargs: Kwargs) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]


def _unit_deviation(x: Tensor) -> Tensor:
    """Each item of `x` `[B, N, C]` divided by its standard deviation."""
    return x / x.float().std(dim=(1, 2), keepdim=True).clamp(min=1e-12).to(x.dtype)
