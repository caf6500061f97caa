"""The hooks around one self-attention: cluster its tokens or reuse clusters, cut the tree, merge, unmerge."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from atc_diffusion.adapters import Args, Family, Kwargs, first
from atc_diffusion.adapters.layer import ImageSlice, Layer, MergedCall, Projection
from atc_diffusion.clustering.tree import Cuttable
from atc_diffusion.config import MergeConfig
from atc_diffusion.merge_map import MergeMap
from atc_diffusion.merging.call import Call, present_call
from atc_diffusion.merging.checkpoints import enter, leave, unseen_by_checkpoints
from atc_diffusion.merging.reuse import Sharing


@dataclass(eq=False)
class LayerHooks:
    """Merging in one layer; what changes from call to call is in the `Call`.

    Attributes:
        owner: the patch of its network.
        layer: the self-attention.
        family: the adapter of its network.
        config: how to merge.
    """

    owner: object
    layer: Layer
    family: Family
    config: MergeConfig

    def attach(self) -> list[RemovableHandle]:
        block, attention = self.layer.block, self.layer.attention
        self._around = (
            attention.register_forward_pre_hook(self._merge, with_kwargs=True),
            attention.register_forward_hook(self._unmerge, prepend=True),
        )
        return [
            *self._around,
            attention.register_forward_hook(self._leave_attention, always_call=True),
            block.register_forward_pre_hook(self._enter_block, with_kwargs=True),
            block.register_forward_hook(self._leave_block, always_call=True),
        ]

    def come_nearest(self) -> None:
        """Merge after all other hooks on the attention, and unmerge before them: they see all tokens."""
        attention: Any = self.layer.attention
        merge, unmerge = (handle.id for handle in self._around)
        if merge in attention._forward_pre_hooks and unmerge in attention._forward_hooks:
            attention._forward_pre_hooks.move_to_end(merge)
            attention._forward_hooks.move_to_end(unmerge, last=False)

    def _enter_block(self, block: nn.Module, args: Args, kwargs: Kwargs) -> None:
        hidden_states = first(args, kwargs)
        call = enter("block", self.owner, self.layer.name, hidden_states)
        if call is not None and self.config.features == "hidden_states":
            call.see(self.layer.name, hidden_states)

    def _leave_block(self, block: nn.Module, args: Args, output: Any) -> None:
        leave("block")

    def _leave_attention(self, attention: nn.Module, args: Args, output: Any) -> None:
        leave("attention")

    def _merge(self, attention: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        call = self._known(enter("attention", self.owner, self.layer.name, first(args, kwargs)))
        image = ImageSlice(math.prod(self.layer.grid(call.size)), call.after)
        cut = partial(self._cut, call, image, self.family.tokens(args, kwargs, image))
        return self.family.merge(attention, args, kwargs, image, cut)

    def _unmerge(self, attention: nn.Module, args: Args, output: Any) -> Any:
        call = self._known(present_call(self.owner))
        call.hidden_states.pop(self.layer.name, None)
        merge = call.merges.get(self.layer.name)
        return output if merge is None else self.family.unmerge(output, merge)  # None: a hook of others skipped it

    def _known(self, call: Call | None) -> Call:
        if call is None:
            raise ValueError(
                f"{self.layer.name} was called outside its network's call; call the network itself, not its forward"
                " method or a part of it, and patch it before, or remove_patch"
            )
        return call

    def _cut(self, call: Call, image: ImageSlice, tokens: Tensor, project: Projection) -> MergedCall:
        """How this call merges `tokens` `[B, N, C]`: by two cuts of one tree.

        An attention that is called several times, such as for portions of the batch, gets clusters for each of them.
        """
        num_tokens = tokens.shape[1]
        nth = call.times_called.get(self.layer.name, 0)
        call.times_called[self.layer.name] = nth + 1
        kept = self._kept(call, num_tokens)
        merge = MergedCall(image, None, None, weigh=False)
        if min(kept) < num_tokens:
            key = (self.layer.name, nth, len(tokens))
            with unseen_by_checkpoints():
                queries, keys = (self._map(call, key, count, tokens, project) for count in kept)
            merge = MergedCall(image, queries, keys, self.config.proportional_attention, self.config.widen_heads)
        call.merges[self.layer.name] = merge
        return merge

    def _kept(self, call: Call, num_tokens: int) -> tuple[int, int]:
        """How many queries and how many keys are kept of `num_tokens`."""
        queries, keys = call.kept[self.layer.level]
        limit = call.limits.get(self.layer.name)
        if limit is None:
            return queries, keys
        return num_tokens, keys if limit.keys_merge else num_tokens

    def _map(self, call: Call, key: object, count: int, tokens: Tensor, project: Projection) -> MergeMap | None:
        """The cut that leaves `count` clusters, or the fewest possible, for a batch of `tokens` `[B, N, C]`."""
        tree, maps = self._tree(call, key, tokens, project), call.clusters.maps
        num_clusters = max(count, tree.num_clusters)
        if num_clusters >= tokens.shape[1]:
            return None
        if (key, count) not in maps:
            labels, sharing = tree.cut(num_clusters), _sharing(call, tokens)
            maps[key, count] = MergeMap(sharing.spread(labels) if sharing else labels, num_clusters)
        return maps[key, count]

    def _tree(self, call: Call, key: object, tokens: Tensor, project: Projection) -> Cuttable:
        trees = call.clusters.trees
        if key not in trees:
            with torch.no_grad():
                fewest = call.fewest[self.layer.level]
                features, grid = self._features(call, tokens, project), self._grid(call, tokens)
                trees[key] = self.config.cluster(features, grid, call.timestep, fewest)
            call.clustered[self.layer.name] = True
        return trees[key]

    def _features(self, call: Call, tokens: Tensor, project: Projection) -> Tensor:
        """The features `[B, N, D]` by which the clustered items of `tokens` `[B, N, C]` are compared."""
        sharing = _sharing(call, tokens)
        pick: Callable[[Tensor], Tensor] = sharing.pick if sharing else lambda x: x
        match self.config.features:
            case "hidden_states":  # of several images, the one to merge comes first
                seen = call.seen(self.layer.name)
                return pick(tokens if seen is None else seen[:, : tokens.shape[1]])
            case "keys_values":
                return torch.cat([_unit_deviation(project(which, pick)) for which in ("keys", "values")], dim=2)
            case which:
                return project(which, pick)

    def _grid(self, call: Call, tokens: Tensor) -> tuple[int, int]:
        height, width = self.layer.grid(call.size)
        if height * width != tokens.shape[1]:
            raise ValueError(
                f"{self.layer.name} has {tokens.shape[1]} tokens, but the grid of its level is {height} x {width};"
                " this layout cannot be merged, so call remove_patch"
            )
        return height, width


def _sharing(call: Call, tokens: Tensor) -> Sharing | None:
    """Which items of `tokens` `[B, N, C]` share clusters; None: none do, or these are a portion of the items."""
    return call.clusters.sharing if len(tokens) == call.items else None


def _unit_deviation(x: Tensor) -> Tensor:
    """Each item of `x` `[B, N, C]` divided by its standard deviation."""
    return x / x.float().std(dim=(1, 2), keepdim=True).clamp(min=1e-12).to(x.dtype)
