"""The forward hooks that merge around the modules of one transformer block."""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from atc_diffusion.config import MergeConfig
from atc_diffusion.merge_map import MergeMap
from atc_diffusion.run import Run

Args = tuple[Any, ...]
Kwargs = dict[str, Any]

_MASKED = -1e4  # as good as -inf, and finite in float16


@dataclass(frozen=True)
class LayerSummary:
    """One patched block: its name, the level's downsampling factor, and what its last run did."""

    name: str
    downsample: int
    tokens: int
    kept: int
    clusterings: int


class BlockHooks:
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
        merge_maps = self.run.merge_maps
        key = str(self.downsample) if self.config.share_layers else self.name
        if key not in merge_maps:
            with torch.no_grad():
                merge_maps[key] = self._merge_map(attn, hidden_states)
            self.clusterings = self.clusterings + 1
        self.merge_map = merge_maps[key]
        self.kept = self.merge_map.num_clusters

    def _merge_map(self, attn: nn.Module, hidden_states: Tensor) -> MergeMap:
        """Group the tokens `[B, N, C]`, those of all the guidance's parts as in the last."""
        parts = self.run.guidance_parts
        compared = cast(Tensor, self.hidden_states) if self.config.features == "hidden_states" else hidden_states
        features = self._features(attn, compared.chunk(parts)[-1])
        return self.config.merge_map(features, self.grid, self.run.timestep).repeat(parts)

    def _features(self, attn: Any, hidden_states: Tensor) -> Tensor:
        """What tokens are compared by, `[B, N, C]`."""
        if self.config.features == "hidden_states":
            return hidden_states
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
