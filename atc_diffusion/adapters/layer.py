"""One self-attention: where it is in its network, which of its tokens are the image's, and how they merge in a call."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias

from torch import Tensor, nn

from atc_diffusion.merge_map import MergeMap

Which = Literal["keys", "values"]

# Under which name a wrapper has its module: checkpoint_wrapper, FullyShardedDataParallel, torch.compile, and
# DistributedDataParallel and DataParallel. What `fully_shard` shards is of the same class as before.
_NAMES = ("_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_orig_mod", "module")


@dataclass(frozen=True)
class Layer:
    """One self-attention that can be merged.

    Attributes:
        name: its path in the network.
        block: the transformer block that contains it.
        attention: the module that receives the tokens `[B, N, C]`.
        level: the downsampling factor of its grid of tokens, relative to the latents.
        channels: `C`.
    """

    name: str
    block: nn.Module
    attention: nn.Module
    level: int
    channels: int

    @classmethod
    def within(cls, block: nn.Module, path: str, name: str, level: int) -> "Layer":
        """The attention called `name` in the transformer block at `path`, which wrappers may be around."""
        block = unwrapped(block)
        attention = unwrapped(getattr(block, name))
        path = ".".join(part for part in path.split(".") if part not in _NAMES)
        return cls(f"{path}.{name}", block, attention, level, attention.query_dim)

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width of its grid of tokens, for latents of `size` (height, width)."""
        height, width = size
        return -(-height // self.level), -(-width // self.level)


def unwrapped(module: Any) -> Any:
    """The module inside all wrappers, those of PEFT too, nested in any order."""
    if hasattr(module, "get_base_model"):
        return unwrapped(module.get_base_model())
    inside = (module._modules[name] for name in _NAMES if name in module._modules)  # scripted ones have no `get`
    inner = next((each for each in inside if each is not None), None)
    return module if inner is None else unwrapped(inner)


@dataclass(frozen=True)
class ImageSlice:
    """Where the image's tokens are in a sequence that also has others, such as text tokens.

    Attributes:
        num_tokens: `N`, how many tokens the image has.
        after: how many tokens follow them.
    """

    num_tokens: int
    after: int = 0

    def split(self, x: Tensor, dim: int) -> tuple[Tensor, ...]:
        """The parts of a sequence `x` before the image, of the image, and after it."""
        return x.split([x.shape[dim] - self.num_tokens - self.after, self.num_tokens, self.after], dim=dim)

    def of(self, x: Tensor, dim: int) -> Tensor:
        """The image's part of a sequence `x`."""
        return x.narrow(dim, x.shape[dim] - self.num_tokens - self.after, self.num_tokens)


@dataclass(frozen=True)
class MergedCall:
    """How the tokens of one call of a self-attention are merged.

    Attributes:
        image: which tokens are the image's; no others are merged.
        queries: merges the tokens of the queries and copies the output back; None keeps all of them.
        keys: merges the tokens of keys and values, or for rotary families keys and values themselves; None keeps all of
            them. The same object as `queries` if as many are kept.
        weigh: add the logarithm of a cluster's size to the logits of its key (proportional attention).
        widen: add it in channels of the heads instead of in a mask.
    """

    image: ImageSlice
    queries: MergeMap | None
    keys: MergeMap | None
    weigh: bool
    widen: bool = False

    @property
    def kept(self) -> tuple[int, int]:
        """The numbers of queries and of keys after merging."""
        maps = self.queries, self.keys
        queries, keys = (self.image.num_tokens if each is None else each.num_clusters for each in maps)
        return queries, keys

    @property
    def log_weights(self) -> Tensor | None:
        """What proportional attention adds to the logits of merged keys, `[B, K]` float32; None: nothing."""
        return self.keys.sizes.float().log() if self.weigh and self.keys is not None else None

    def merge_queries(self, x: Tensor) -> Tensor:
        return x if self.queries is None else self.queries.merge(x)

    def merge_keys(self, x: Tensor) -> Tensor:
        return x if self.keys is None else self.keys.merge(x)

    def unmerge(self, x: Tensor) -> Tensor:
        return x if self.queries is None else self.queries.unmerge(x)


class Projection(Protocol):
    """How the keys or values of an image's tokens are had, of those items of a batch that `pick` picks."""

    def __call__(self, which: Which, pick: Callable[[Tensor], Tensor]) -> Tensor:
        """Keys or values `[B', N, D]` of all heads; keys normed and rotated, if the model does that."""


Cut: TypeAlias = Callable[[Projection], MergedCall]


@dataclass(frozen=True)
class Demands:
    """What merging asks of an attention.

    Attributes:
        fewer_queries: queries merge.
        separate_keys: keys and queries merge differently.
        wider_heads: merged keys are weighed in channels of the heads.
    """

    fewer_queries: bool
    separate_keys: bool
    wider_heads: bool = False
