"""The forward hooks that merge tokens inside one block of timm's VisionTransformer.

A block computes `x = x + attention(norm1(x))`, then `x = x + mlp(norm2(x))`, and tokens merge in between. No hook can
change `x` there, but hooks can change everything that `x` is computed from: a merging block receives 0 for `x`, `norm1`
receives the tokens, and the last module of the attention branch returns their sum, merged. The MLP then sees clusters.

Between blocks the sequence always has its full length: every token is a copy of its cluster, and the next block merges
the copies again. So everything that timm does with features (intermediate feature maps, any kind of pooling) sees all
patches, and each cluster weighs as much as its members. The map of the merges travels from block to block as an
attribute of the tensor. It therefore belongs to the call, whichever thread runs it, and a checkpointed block finds it
again when it is recomputed.
"""

import threading
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from atc_diffusion.adapters.vit_config import PRUNING, ViTConfig
from atc_diffusion.adapters.vit_merges import Attention, Merged, cluster, prune
from atc_diffusion.tracing import refuse_tracing

Args = tuple[Any, ...]
Kwargs = dict[str, Any]

_MERGED = "_atc_merged"


@dataclass
class BlockCall:
    """State that the hooks of one block share during one call; `num_clusters` is None if the block merges nothing."""

    tokens: Tensor
    merged: Merged | None
    num_clusters: int | None
    queries_keys: tuple[Tensor, ...] = ()


class _Thread(threading.local):  # unlike a context variable, torch.compile can trace it
    call: BlockCall | None = None


_thread = _Thread()


class BlockHooks:
    """The hooks of one block: they repeat earlier merges and, if the configuration asks for it, merge further."""

    def __init__(self, config: ViTConfig, index: int, depth: int, num_prefix_tokens: int) -> None:
        self.config = config
        self.index = index
        self.depth = depth
        self.num_prefix_tokens = num_prefix_tokens

    def attach(self, block: Any) -> list[RemovableHandle]:
        return [
            block.register_forward_pre_hook(self._enter, with_kwargs=True),
            block.norm1.register_forward_pre_hook(self._give_tokens),
            block.attn.q_norm.register_forward_hook(self._see),
            block.attn.k_norm.register_forward_hook(self._see),
            block.drop_path1.register_forward_hook(self._merge),
            block.register_forward_hook(self._leave),
        ]

    def _enter(self, block: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        refuse_tracing()
        if kwargs.get("attn_mask") is not None or kwargs.get("is_causal"):
            raise ValueError("attn_mask and is_causal apply to all tokens, but merging leaves fewer; call remove_patch")
        x, merged = args[0], getattr(args[0], _MERGED, None)
        num_clusters = self._num_clusters(x.shape[1] - self.num_prefix_tokens)
        if merged is not None:
            x = merged.merge_map.merge(x)
            kwargs = kwargs | {"attn_mask": merged.bias if merged.bias is None else merged.bias.to(x.dtype)}
        _thread.call = BlockCall(x, merged, num_clusters)
        return (x if num_clusters is None else x.new_zeros(()), *args[1:]), kwargs

    def _num_clusters(self, num_patches: int) -> int | None:
        """How many clusters of patches this block leaves; None if it merges nothing."""
        kept = (num_patches, *self.config.kept(num_patches, self.depth))[self.index : self.index + 2]
        return None if kept[0] == kept[1] else kept[1] + (self.config.method in PRUNING)

    def _give_tokens(self, norm1: nn.Module, args: Args) -> Tensor | None:
        call = _thread.call
        return None if call is None or call.num_clusters is None else call.tokens

    def _see(self, norm: nn.Module, args: Args, output: Tensor) -> None:
        if _thread.call is not None:
            _thread.call.queries_keys += (output.detach(),)

    def _merge(self, drop_path1: nn.Module, args: Args, output: Tensor) -> Tensor | None:
        call = _thread.call
        if call is None or call.num_clusters is None:
            return None
        queries, keys = call.queries_keys
        attention = Attention(queries, keys, call.merged, self.num_prefix_tokens)
        merge = prune if self.config.method in PRUNING else cluster
        call.merged, x = merge(call.tokens + output, attention, self.config, call.num_clusters)
        return x

    def _leave(self, block: nn.Module, args: Args, output: Tensor) -> Tensor | None:
        call, _thread.call = _thread.call, None
        if call is None or call.merged is None:
            return None
        output = call.merged.merge_map.unmerge(output)
        setattr(output, _MERGED, call.merged)
        return output
