"""Model families: where their self-attentions are, and how tokens go in and out of them."""

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
        block: the transformer block that it is in.
        attention: the module that is called with the tokens `[B, N, C]`.
        level: the factor by which its grid of tokens is smaller than the latents.
        channels: `C`.
    """

    name: str
    block: nn.Module
    attention: nn.Module
    level: int
    channels: int

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width of its grid of tokens, for latents of a `size`."""
        height, width = size
        return -(-height // self.level), -(-width // self.level)


@dataclass(frozen=True)
class Merge:
    """What is merged in one call of a self-attention; None: nothing.

    Attributes:
        num_tokens: how many tokens there are.
        queries: merges what queries are made of, and copies the output back.
        keys: merges what keys and values are made of; the same object as `queries` where as many are kept.
        weigh: whether keys weigh as much as their members did (proportional attention).
    """

    num_tokens: int
    queries: MergeMap | None
    keys: MergeMap | None
    weigh: bool

    @property
    def kept(self) -> tuple[int, int]:
        """How many queries and how many keys there are."""
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
    """What an adapter answers for the networks of one family."""

    def layers(self, network: nn.Module) -> list[Layer]:
        """The self-attentions of `network`; none if it is of another family."""

    def attach(self, layer: Layer) -> None:
        """Put in what merging needs besides hooks, unless it is there; called before every call of the network."""

    def detach(self, layer: Layer) -> None:
        """Undo `attach`, to the bit."""

    def check(self, layer: Layer, keys_apart: bool) -> None:
        """Raise ValueError if the attention's processor cannot merge, or not keys apart from queries."""

    def features(self, layer: Layer, tokens: Tensor, which: Literal["keys", "values"]) -> Tensor:
        """Keys or values `[B, N, C]` that the attention makes of `tokens` `[B, N, C]`."""

    def merge(self, layer: Layer, args: Args, kwargs: Kwargs, merge: Merge) -> tuple[Args, Kwargs]:
        """The arguments of the attention with its tokens merged and, where asked, their weights in the softmax."""

    def unmerge(self, output: Any, merge: Merge) -> Any:
        """The attention's output with that of every cluster copied to its members."""
