"""What an adapter of a model family provides: its self-attentions, and how tokens go in and out of them."""

from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch import Tensor, nn

from atc_diffusion.merge_map import MergeMap

Args = tuple[Any, ...]
Kwargs = dict[str, Any]


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

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width of its grid of tokens, for latents of `size` (height, width)."""
        height, width = size
        return -(-height // self.level), -(-width // self.level)


@dataclass(frozen=True)
class Merge:
    """How the tokens of one call of a self-attention are merged.

    Attributes:
        num_tokens: `N`, before merging.
        queries: merges the tokens of the queries and copies the output back; None keeps all of them.
        keys: merges the tokens of keys and values; None keeps all of them. The same object as `queries` if as many are
            kept.
        weigh: add the logarithm of a cluster's size to the logits of its key (proportional attention).
    """

    num_tokens: int
    queries: MergeMap | None
    keys: MergeMap | None
    weigh: bool

    @property
    def kept(self) -> tuple[int, int]:
        """The numbers of queries and of keys after merging."""
        return self._kept(self.queries), self._kept(self.keys)

    def _kept(self, merge_map: MergeMap | None) -> int:
        return self.num_tokens if merge_map is None else merge_map.num_clusters

    def merge_queries(self, x: Tensor) -> Tensor:
        return x if self.queries is None else self.queries.merge(x)

    def merge_keys(self, x: Tensor) -> Tensor:
        return x if self.keys is None else self.keys.merge(x)

    def unmerge(self, x: Tensor) -> Tensor:
        return x if self.queries is None else self.queries.unmerge(x)


class Family(Protocol):
    """The adapter of one model family."""

    def layers(self, network: nn.Module) -> list[Layer]:
        """The self-attentions of `network`; empty if it belongs to another family."""

    def attach(self, layer: Layer) -> None:
        """Install what merging needs besides hooks, unless it is there; called before every call of the network."""

    def detach(self, layer: Layer) -> None:
        """Undo `attach` exactly."""

    def check(self, layer: Layer, keys_apart: bool) -> None:
        """Raise ValueError if the attention's processor cannot merge or, if `keys_apart`, merge keys unlike queries."""

    def features(self, layer: Layer, tokens: Tensor, which: Literal["keys", "values"]) -> Tensor:
        """Keys or values `[B, N, C]` that the attention projects from `tokens` `[B, N, C]`."""

    def merge(self, layer: Layer, args: Args, kwargs: Kwargs, merge: Merge) -> tuple[Args, Kwargs]:
        """The arguments of the attention with its tokens merged and, if `merge.weigh`, weighted in the softmax."""

    def unmerge(self, output: Any, merge: Merge) -> Any:
        """The attention's output, with the output of every cluster copied to its members."""
