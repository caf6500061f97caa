"""Batched reciprocal merging in plain torch (RAC, Sumengen et al. 2021, arXiv 2105.11653).

Every linkage here is reducible: the union of two clusters is never closer to a third than the nearer of the two was.
So every pair of clusters that are each other's nearest neighbour is joined in the final tree, and a round joins all
such pairs. Single linkage is reducible too, but a spanning tree is faster.
"""

import math
from typing import Protocol

import torch
from torch import Tensor

from atc_diffusion.clustering import _single
from atc_diffusion.clustering._linkage import UPDATES
from atc_diffusion.clustering._prepare import prepare
from atc_diffusion.clustering.tree import ClusterTree

TILE = 2**20  # distances per tile; 4 MiB in float32 stays in a core's cache


class Clusters(Protocol):
    """The active clusters, `[B, M]`, and the distances between them."""

    sizes: Tensor

    def distances(self, rows: Tensor, start: int = 0) -> Tensor:
        """Distances `[B, Q, M - start]`, or a monotone function of them, from `rows` `[B, Q]` to slots >= `start`."""

    def heights(self, merged: Tensor) -> Tensor:
        """Distances from values that `distances` returned."""

    def merge(self, keep: Tensor, partners: Tensor, d: Tensor) -> None:
        """Keep the slots `keep` `[B, M']`, each joined with its slot in `partners` (or itself) at distance `d`."""


def build_tree(tokens: Tensor, linkage: str, metric: str, num_clusters: int, together: int = 1) -> ClusterTree:
    """Cluster `tokens` `[B, N, C]` (`[B, N, N]` if precomputed), every `together` items down to `num_clusters`."""
    tokens = prepare(tokens, metric)
    if linkage == "single":
        return _single.build_tree(pairwise_distances(tokens, metric))
    return _ReciprocalMerging(_clusters(tokens, linkage, metric), num_clusters, together).run()


def _clusters(tokens: Tensor, linkage: str, metric: str) -> Clusters:
    if (linkage, metric) == ("average", "cosine"):
        return _CosineMeans(tokens)
    if (linkage, metric) == ("ward", "euclidean"):
        return _WardMeans(tokens)
    return _Matrix(pairwise_distances(tokens, metric), linkage)


def pairwise_distances(tokens: Tensor, metric: str) -> Tensor:
    """Distances `[B, N, N]` of prepared tokens."""
    if metric == "precomputed":
        return tokens
    return cosine_distances(tokens, tokens) if metric == "cosine" else torch.cdist(tokens, tokens)


def cosine_distances(a: Tensor, b: Tensor) -> Tensor:
    return torch.baddbmm(a.new_ones(1), a, b.mT, alpha=-1)


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows `[B, Q, ...]` of `x` `[B, M, ...]` at `index` `[B, Q]`."""
    offsets = torch.arange(len(x), device=x.device)[:, None] * x.shape[1]
    return x.flatten(0, 1).index_select(0, (index + offsets).flatten()).unflatten(0, index.shape)


def _columns(x: Tensor, index: Tensor) -> Tensor:
    """Columns `[B, R, Q]` of `x` `[B, R, M]` at `index` `[B, Q]`."""
    return x.gather(2, index[:, None, :].expand(-1, x.shape[1], -1))


class _Means:
    """Clusters as the means of their tokens: memory `O(N C)`, no matrix of distances."""

    def __init__(self, tokens: Tensor) -> None:
        self.means = tokens
        self.sizes = tokens.new_ones(tokens.shape[:2])

    def merge(self, keep: Tensor, partners: Tensor, d: Tensor) -> None:
        sizes, added = self.sizes.gather(1, keep), self.sizes.gather(1, partners)
        added = added.masked_fill(partners == keep, 0)
        # A step towards the partner, not a sum: the mean of identical tokens stays exactly that token.
        self.sizes = sizes + added
        self.means = torch.lerp(_rows(self.means, keep), _rows(self.means, partners), (added / self.sizes)[..., None])


class _CosineMeans(_Means):
    """Average linkage over cosine distance: the mean of all cosines is the product of the mean unit vectors."""

    def distances(self, rows: Tensor, start: int = 0) -> Tensor:
        return torch.bmm(_rows(self.means, rows).neg_(), self.means[:, start:].mT)

    def heights(self, merged: Tensor) -> Tensor:
        return (1 + merged).clamp_(min=0)


class _WardMeans(_Means):
    """Ward's linkage, squared and halved: n_i n_j / (n_i + n_j) times the squared distance of the means."""

    def __init__(self, tokens: Tensor) -> None:
        super().__init__(tokens)
        self.norms = self.means.square().sum(dim=2)

    def merge(self, keep: Tensor, partners: Tensor, d: Tensor) -> None:
        super().merge(keep, partners, d)
        self.norms = self.means.square().sum(dim=2)

    def distances(self, rows: Tensor, start: int = 0) -> Tensor:
        means, norms, sizes = (x[:, start:] for x in (self.means, self.norms, self.sizes))
        squared = torch.baddbmm(norms[:, None, :], _rows(self.means, rows), means.mT, alpha=-2)
        squared.add_(self.norms.gather(1, rows)[:, :, None])
        return squared.div_(1 / self.sizes.gather(1, rows)[:, :, None] + 1 / sizes[:, None, :])

    def heights(self, merged: Tensor) -> Tensor:
        return (2 * merged).clamp_(min=0).sqrt_()


class _Matrix:
    """Any linkage, on the matrix `[B, M, M]` of distances."""

    def __init__(self, matrix: Tensor, linkage: str) -> None:
        self.matrix = matrix
        self.sizes = matrix.new_ones(matrix.shape[:2])
        self._join = UPDATES[linkage]

    def distances(self, rows: Tensor, start: int = 0) -> Tensor:
        return _rows(self.matrix, rows)[:, :, start:]

    def heights(self, merged: Tensor) -> Tensor:
        return merged

    def merge(self, keep: Tensor, partners: Tensor, d: Tensor) -> None:
        pairs = _where_first(partners != keep)
        d, first, second = (x.gather(1, pairs) for x in (d, keep, partners))
        n_first, n_second = self.sizes.gather(1, first), self.sizes.gather(1, second)
        alone = first == second

        rows = _rows(self.matrix, first), _rows(self.matrix, second)
        joined = self._join(*rows, d[:, :, None], n_first[:, :, None], n_second[:, :, None], self.sizes[:, None, :])
        joined = torch.where(alone[:, :, None], rows[0], joined)
        self.sizes = self.sizes.gather(1, keep).scatter_add_(1, pairs, n_second.masked_fill(alone, 0))

        columns = _columns(joined, first), _columns(joined, second)
        n_pairs = self.sizes.gather(1, pairs)[:, :, None]
        both = self._join(*columns, d[:, None, :], n_first[:, None, :], n_second[:, None, :], n_pairs)
        both = torch.where(alone[:, None, :], columns[0], both)

        joined = _columns(joined, keep).scatter_(2, pairs[:, None, :].expand_as(both), both)
        self.matrix = _columns(_rows(self.matrix, keep), keep)
        self.matrix.scatter_(1, pairs[:, :, None].expand_as(joined), joined)
        self.matrix.scatter_(2, pairs[:, None, :].expand_as(joined.mT), joined.mT)


class _ReciprocalMerging:
    """The active clusters, in slots `[B, M]` with the stale ones first, and the merges so far.

    A cluster keeps its nearest neighbour until that neighbour merges. Then it is stale, and its old distance is a lower
    bound on the new one.
    """

    def __init__(self, clusters: Clusters, num_clusters: int, together: int = 1) -> None:
        batch, num_tokens = clusters.sizes.shape
        device = clusters.sizes.device
        self.clusters = clusters
        self.num_tokens = num_tokens
        self.num_clusters = num_clusters
        self.together = together
        self.num_merges = together * num_tokens - num_clusters  # of so many items
        self.ids = torch.arange(num_tokens, device=device).repeat(batch, 1)  # first tokens; num_tokens: empty
        self.neighbours = torch.zeros_like(self.ids)  # first tokens
        self.bounds = torch.zeros_like(clusters.sizes)  # least possible distance to any other cluster
        self.formed = torch.full_like(clusters.sizes, -math.inf)  # height at which the cluster was formed
        self.num_stale = num_tokens  # stale clusters, the maximum over the batch
        # Empty slots are scattered to an extra column.
        self.parents = torch.arange(num_tokens + 1, device=device).repeat(batch, 1)
        self.heights = clusters.sizes.new_full((batch, num_tokens + 1), math.inf)
        self.rounds = torch.zeros_like(self.parents)

    @property
    def slots(self) -> Tensor:
        return torch.arange(self.ids.shape[1], device=self.ids.device).expand_as(self.ids)

    def run(self) -> ClusterTree:
        """Merge until no distance is left up to the `num_merges`-th smallest height; at most N - 1 rounds."""
        number = 0
        while self.num_merges and self.ids.shape[1] > 1:
            self._search()
            self._merge(number)
            number += 1
        heights = self.clusters.heights(self.heights[:, :-1])
        return ClusterTree.from_merges(self.parents[:, :-1], heights, self.rounds[:, :-1], self.num_clusters)

    def _search(self) -> None:
        """Find the nearest neighbours of the stale clusters.

        Distances are symmetric, so only tiles on or above the diagonal are computed; each serves its rows and columns.
        """
        batch, num_slots = self.ids.shape
        self.bounds[:, : self.num_stale] = math.inf
        start = 0
        while start < self.num_stale:
            stop = min(start + max(1, TILE // (batch * (num_slots - start))), self.num_stale)
            distances = self._distances(self.slots[:, start:stop], start)
            self._keep_nearer(slice(start, stop), start, distances, dim=2)
            if stop < self.num_stale:
                mirrored = distances[:, :, stop - start : self.num_stale - start]
                self._keep_nearer(slice(stop, self.num_stale), start, mirrored, dim=1)
            start = stop

    def _distances(self, rows: Tensor, start: int = 0) -> Tensor:
        """As `Clusters.distances`, but infinite from a cluster to itself and for empty slots."""
        distances = self.clusters.distances(rows, start).scatter_(2, rows[:, :, None] - start, math.inf)
        empty = self.ids == self.num_tokens
        if empty.any():
            distances.masked_fill_(empty.gather(1, rows)[:, :, None] | empty[:, None, start:], math.inf)
        return distances

    def _keep_nearer(self, slots: slice, start: int, distances: Tensor, dim: int) -> None:
        """Update the nearest neighbours of `slots` with minima of `distances` along `dim`, which begins at `start`."""
        nearest, places = distances.min(dim=dim)
        nearer = nearest < self.bounds[:, slots]
        neighbours = self.ids[:, start:].gather(1, places)
        self.bounds[:, slots] = torch.where(nearer, nearest, self.bounds[:, slots])
        self.neighbours[:, slots] = torch.where(nearer, neighbours, self.neighbours[:, slots])

    def _merge(self, number: int) -> None:
        """Join all reciprocal pairs, record them as round `number`, and drop clusters that will not merge again."""
        partners, paired = self._pairs()
        heights = torch.stack([self.bounds, self.formed, self.formed.gather(1, partners)]).amax(dim=0)
        heights = torch.minimum(heights, heights.gather(1, partners))
        into = self.ids.gather(1, partners)
        absorbed = paired & (into < self.ids)
        self._record(absorbed, into, heights, number)

        self.formed = torch.where(paired, heights, self.formed)
        self.bounds = torch.where(paired, heights, self.bounds)
        keep = ~absorbed & (self.ids < self.num_tokens) & (self.bounds < self._last())
        stale = keep & (paired | (paired | ~keep).gather(1, partners))
        self._compact(keep, stale, torch.where(paired, partners, self.slots), heights)

    def _last(self) -> Tensor:
        """The least number `[B, 1]` above the `num_merges`-th smallest height of the items that are cut together."""
        heights = self.heights[:, :-1].reshape(len(self.ids) // self.together, self.together * self.num_tokens)
        last = heights.kthvalue(self.num_merges, dim=1).values.repeat_interleave(self.together)[:, None]
        return last.nextafter(last.new_tensor(math.inf))  # ties are ordered as in the whole tree

    def _pairs(self) -> tuple[Tensor, Tensor]:
        """Slots `[B, M]` of the nearest neighbours, and a mask of the reciprocal ones."""
        partners, paired = self._partners()
        tied = ~paired & (self.bounds < math.inf) & (self.bounds == self.bounds.gather(1, partners))
        if tied.any():
            self._pair_off(tied)
            partners, paired = self._partners()
        return partners, paired

    def _pair_off(self, tied: Tensor) -> None:
        """Break ties of the slots `tied` `[B, M]`: of equally near clusters, choose the one with the smallest i XOR j.

        XOR is symmetric, so equal tokens form pairs instead of all choosing the same one.
        """
        for rows in _where_first(tied).split(max(1, TILE // self.ids.numel()), dim=1):
            distances, row_ids = self._distances(rows), self.ids.gather(1, rows)
            nearest = distances.amin(dim=2)
            apart = row_ids[:, :, None] ^ self.ids[:, None, :]
            apart.masked_fill_(distances > nearest[:, :, None], torch.iinfo(torch.int64).max)
            self.bounds.scatter_(1, rows, nearest)
            self.neighbours.scatter_(1, rows, row_ids ^ apart.amin(dim=2))

    def _partners(self) -> tuple[Tensor, Tensor]:
        slot_of = torch.zeros_like(self.parents).scatter_(1, self.ids, self.slots)
        partners = slot_of.gather(1, self.neighbours)
        # Rounding can leave a ring of neighbours without a reciprocal pair: the closest pair always joins.
        closest = self.bounds.argmin(dim=1, keepdim=True)
        partners.scatter_(1, partners.gather(1, closest), closest)
        return partners, (partners.gather(1, partners) == self.slots) & (self.bounds < math.inf)

    def _record(self, absorbed: Tensor, into: Tensor, heights: Tensor, number: int) -> None:
        ids = self.ids.masked_fill(~absorbed, self.num_tokens)
        self.parents.scatter_(1, ids, into)
        self.heights.scatter_(1, ids, heights)
        self.rounds.scatter_(1, ids, number)

    def _compact(self, keep: Tensor, stale: Tensor, partners: Tensor, heights: Tensor) -> None:
        kept = _where_first(keep.byte() + stale)
        self.num_stale = int(stale.sum(dim=1).max())
        self.clusters.merge(kept, partners.gather(1, kept), heights.gather(1, kept))
        self.ids = self.ids.masked_fill(~keep, self.num_tokens).gather(1, kept)
        empty = self.ids == self.num_tokens
        self.bounds = self.bounds.gather(1, kept).masked_fill(empty, math.inf)
        self.formed = self.formed.gather(1, kept)
        self.neighbours = self.neighbours.gather(1, kept)


def _where_first(mask: Tensor) -> Tensor:
    """Slots `[B, Q]` where `mask` `[B, M]` is nonzero, largest first; shorter items are padded with others."""
    longest = int(mask.count_nonzero(dim=1).max())
    return mask.sort(dim=1, descending=True, stable=True).indices[:, :longest]
