"""timm's VisionTransformer: where its blocks are, and what a patch of them does."""

from dataclasses import dataclass
from typing import Any

from torch.utils.hooks import RemovableHandle

from atc_diffusion.adapters.vit_blocks import BlockHooks
from atc_diffusion.adapters.vit_config import PRUNING, ViTConfig


@dataclass(frozen=True)
class BlockSummary:
    """Patches that come into one block and that are kept behind its self-attention."""

    name: str
    tokens: int
    kept: int


@dataclass(frozen=True)
class ViTSummary:
    """What a patch does to pictures of the model's own size; prints as a table."""

    config: ViTConfig
    blocks: tuple[BlockSummary, ...]

    def __str__(self) -> str:
        width = max(len(block.name) for block in self.blocks)
        rows = (f"{block.name:{width}}  {block.tokens:>6}  {block.kept:>6}" for block in self.blocks)
        return "\n".join([str(self.config), f"{'block':{width}}  tokens    kept", *rows])


class ViTPatch:
    """Merging in one VisionTransformer. The hooks are PyTorch's own, so a deep copy of it has its own patch.

    Raises:
        ValueError: for a model or a block that is not timm's, a block that is not there, or a pruning method where
            no class token decides the output.
    """

    def __init__(self, model: Any, config: ViTConfig) -> None:
        _check(model, config)
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

    def summary(self) -> ViTSummary:
        patches: int = self._model.patch_embed.num_patches
        kept = self.config.kept(patches, len(self._model.blocks))
        numbers = zip((patches, *kept), kept, strict=False)
        return ViTSummary(self.config, tuple(BlockSummary(f"blocks.{i}", *each) for i, each in enumerate(numbers)))


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
