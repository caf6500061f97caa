"""The result of clustering: a tree that can be cut anywhere without clustering again."""

from dataclasses import dataclass
from numbers import Integral
from typing import Protocol

import torch
from torch import Tensor

from atc_diffusion.devices import is_traced
from atc_diffusion.validation import is_number


class Cuttable(Protocol):
    """Clusters once, gives any number of clusters from `num_clusters` up."""

    @property
    def num_clusters(self) -> int:
        """The fewest clusters that can be asked for."""

    def cut(self, num_clusters: int) -> Tensor:
        """Labels `[B, N]` of exactly `num_clusters` clusters, numbered by first token."""


@dataclass(frozen=True, eq=False)
class ClusterTree:
    """A hierarchical clustering of `N` tokens, for a batch of `B` problems.

    A cluster is named by its first token. When two clusters join, the later name disappears into the earlier:

    Attributes:
        parents: `[B, N]` int64, the cluster that absorbed each token's cluster; itself where none did.
        heights: `[B, N]`, the distance at which that happened; infinite where it did not.
        order: `[B, N]` int64, the tokens in the order in which they were absorbed, the others behind them.
        num_clusters: the least number of clusters that it was built down to.
        device: where labels go; None: where the tree is.

    Heights never fall along a chain of parents, so every prefix of `order` is a valid clustering.
    """

    parents: Tensor
    heights: Tensor
    order: Tensor
    num_clusters: int = 1
    device: torch.device | None = None

    @classmethod
    def from_merges(cls, parents: Tensor, heights: Tensor, rounds: Tensor, num_clusters: int = 1) -> "ClusterTree":
        """Order recorded merges by height, then round, then token; all tensors are `[B, N]`."""
        by_round = rounds.argsort(dim=1, stable=True)
        by_height = heights.gather(1, by_round).argsort(dim=1, stable=True)
        return cls(parents, heights, by_round.gather(1, by_height), num_clusters)

    def cut(self, num_clusters: int) -> Tensor:
        """Labels `[B, N]` of exactly `num_clusters` clusters, numbered by first token.

        Raises:
            ValueError: if the tree has fewer tokens, or was not built down to so few clusters.
        """
        num_tokens = self.parents.shape[1]
        check_num_clusters(num_clusters, num_tokens)
        if num_clusters < self.num_clusters:
            raise ValueError(f"this tree was not built down to {num_clusters} clusters; build it with fewer")
        absorbed = torch.zeros_like(self.parents, dtype=torch.bool)
        return self._labels(absorbed.scatter(1, self.order[:, : num_tokens - num_clusters], True))

    def cut_at(self, distance: float) -> Tensor:
        """Labels `[B, N]` after every merge of at most `distance`; the number of clusters may differ by item.

        Raises:
            ValueError: if it is no number, or so large that merges may be missing that the tree was not built down to.
        """
        if not is_number(distance) or distance != distance:
            raise ValueError(f"distance must be a number, got {distance!r}")
        if self.num_clusters > 1 and not is_traced(self.heights):
            highest = self.heights.masked_fill(self.heights.isinf(), -torch.inf).amax(dim=1)
            if (highest <= distance).any():
                raise ValueError(
                    f"this tree was not built up to a distance of {distance}; build it with num_clusters=1"
                )
        return self._labels(self.heights <= distance)

    def _labels(self, absorbed: Tensor) -> Tensor:
        return _number(_first_tokens(self.parents, absorbed)).to(self.device or self.parents.device)


def check_num_clusters(num_clusters: int, num_tokens: int) -> None:
    """Raise ValueError for what is no number of clusters that `num_tokens` tokens can have."""
    if not isinstance(num_clusters, Integral | torch.SymInt) or isinstance(num_clusters, bool):
        raise ValueError(f"num_clusters must be a whole number, got {num_clusters!r}")
    if not 1 <= num_clusters <= num_tokens:
        raise ValueError(f"num_clusters must be between 1 and the {num_tokens} tokens there are, got {num_clusters}")


def number_clusters(names: Tensor) -> Tensor:
    """Labels `[B, N]`, numbered by first token; tokens with equal `names` `[B, N]`, in `0..N - 1`, share a cluster."""
    tokens = torch.arange(names.shape[1], device=names.device).expand_as(names)
    first = torch.full_like(names, names.shape[1]).scatter_reduce(1, names, tokens, "amin").gather(1, names)
    return _number(first)


def _number(first: Tensor) -> Tensor:
    """Labels `[B, N]`, numbered by first token, from the first token of each token's cluster."""
    tokens = torch.arange(first.shape[1], device=first.device)
    return ((first == tokens).cumsum(dim=1) - 1).gather(1, first)


def _first_tokens(parents: Tensor, absorbed: Tensor) -> Tensor:
    """The root `[B, N]` of each token's chain of parents, by pointer jumping: chains halve every time."""
    first = torch.where(absorbed, parents, torch.arange(parents.shape[1], device=parents.device))
    for _ in range(parents.shape[1].bit_length()):
        first = first.gather(1, first)
    return first
