"""The forward hooks that merge tokens inside the blocks of timm's VisionTransformer.

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

from atc_diffusion.adapters import Args, Kwargs
from atc_diffusion.calls.stack import refuse_tracing
from atc_diffusion.report import LayerSummary, RecordedMerge
from atc_diffusion.vit import PRUNING, ViTConfig
from atc_diffusion.vit.reduce import Attention, Reduction, cluster, prune

_REDUCTION = "_atc_reduction"  # the attribute of a sequence


@dataclass
class BlockCall:
    """State that the hooks of one block share during one call; `num_clusters` is None if the block merges nothing."""

    tokens: Tensor
    reduction: Reduction | None
    num_clusters: int | None
    queries_keys: tuple[Tensor, ...] = ()


class _Thread(threading.local):  # unlike a context variable, torch.compile can trace it
    call: BlockCall | None = None


_thread = _Thread()


@dataclass(eq=False)
class BlockHooks:
    """The hooks of one block: they repeat earlier merges and, if the configuration asks for it, merge further."""

    config: ViTConfig
    index: int
    depth: int
    num_prefix_tokens: int

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
        x, reduction = args[0], getattr(args[0], _REDUCTION, None)
        num_clusters = self._num_clusters(x.shape[1] - self.num_prefix_tokens)
        if reduction is not None:
            x = reduction.merge_map.merge(x)
            kwargs = kwargs | {"attn_mask": None if reduction.bias is None else reduction.bias.to(x.dtype)}
        _thread.call = BlockCall(x, reduction, num_clusters)
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
        attention = Attention(queries, keys, call.reduction, self.num_prefix_tokens)
        reduce = prune if self.config.method in PRUNING else cluster
        call.reduction, x = reduce(call.tokens + output, attention, self.config, call.num_clusters)
        return x

    def _leave(self, block: nn.Module, args: Args, output: Tensor) -> Tensor | None:
        call, _thread.call = _thread.call, None
        if call is None or call.reduction is None:
            return None
        output = call.reduction.merge_map.unmerge(output)
        setattr(output, _REDUCTION, call.reduction)
        return output


class ViTPatch:
    """Merging in one VisionTransformer. The hooks are PyTorch's own, so a deep copy of it has its own patch.

    Raises:
        ValueError: for a model or a block that is not timm's, a block that is not there, or a pruning method where
            no class token decides the output.
    """

    def __init__(self, name: str, model: Any, config: ViTConfig) -> None:
        _check(model, config)
        self.name = name
        self.config = config
        self._model = model
        self._handles: list[RemovableHandle] = []

    def attach(self) -> None:
        blocks = self._model.blocks
        for index, block in enumerate(blocks):
            hooks = BlockHooks(self.config, index, len(blocks), self._model.num_prefix_tokens)
            self._handles += hooks.attach(block)

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()

    def summaries(self) -> list[LayerSummary]:
        """What each self-attention sees of an image of the model's own size, where nothing depends on the run."""
        patches: int = self._model.patch_embed.num_patches
        level, channels = self._model.patch_embed.patch_size[0], self._model.embed_dim
        layers, before = [], patches
        for index, after in enumerate(self.config.kept(patches, len(self._model.blocks))):
            seen = (before + (self.config.method in PRUNING and before < patches),)  # the pruned make one token
            name, clusterings = f"blocks.{index}.attn", int(after < before)
            layers.append(LayerSummary(self.name, name, level, channels, patches, seen, seen, clusterings))
            before = after
        return layers

    def forecasts(self) -> None:
        """A vision transformer has no steps."""

    def merges(self) -> list[RecordedMerge]:
        raise ValueError(
            "merge_maps is for diffusion networks; in a vision transformer, patches of one cluster have equal features"
            " in model.forward_intermediates"
        )

    def __str__(self) -> str:
        """How many patches the attentions of the first and the last block see."""
        layers = self.summaries()
        kind = self.name or type(self._model).__name__
        return f"{kind}: {len(layers)} attentions, {layers[0].kept[0]} -> {layers[-1].kept[0]} patches"


def _check(model: Any, config: ViTConfig) -> None:
    from timm.layers import Attention
    from timm.models.vision_transformer import Block, VisionTransformer

    if not isinstance(model, VisionTransformer):
        raise ValueError(f"ViTConfig is for timm's VisionTransformer (DeiT, MAE, ViT), got {type(model).__name__}")
    for block in model.blocks:
        if not isinstance(block, Block) or not isinstance(block.attn, Attention):
            raise ValueError(
                f"ViTConfig is for timm's Block with Attention, got {type(block).__name__} with"
                f" {type(getattr(block, 'attn', None)).__name__}; build the model with block_fn=Block"
            )
    if config.r is not None and max(config.blocks) > len(model.blocks):
        raise ValueError(f"blocks={config.blocks}, but the model has blocks 1 to {len(model.blocks)}; use some of them")
    if config.method in PRUNING and not (model.has_class_token and model.global_pool == "token"):
        raise ValueError(
            f"method={config.method!r} ranks tokens by a class token that makes the output, but this model has"
            f" global_pool={model.global_pool!r}; use a merging method, such as 'atc'"
        )
