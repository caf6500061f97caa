"""Batched reciprocal merging in plain torch (RAC, Sumengen et al. 2021, arXiv 2105.11653).

Every linkage here is reducible: the union of two clusters is never closer to a third than the nearer of the two was.
So every pair of clusters that are each other's nearest neighbour is joined in the final tree, and a round joins all
such pairs. Average, complete and Ward's linkage join about a third of the clusters in a round. Single linkage lets
clusters grow by one token at a time: down to an eighth of 4096 tokens it took 34 rounds where neighbours were alike,
and 974 where tokens were drawn at random.
"""

import math

import torch
from torch import Tensor

from atc_diffusion.clustering._clusters import Clusters, make_clusters, prepare, where_first
from atc_diffusion.clustering.tree import ClusterTree

TILE_DISTANCES = 2**20  # computed together: 4 MiB in float32, which stays in a core's cache


def build_tree(tokens: Tensor, num_clusters: int, linkage: str, metric: str, together: int = 1) -> ClusterTree:
    """Cluster `tokens` `[B, N, C]` (`[B, N, N]` if precomputed), every `together` items down to `num_clusters`."""
    return _ReciprocalMerging(make_clusters(prepare(tokens, metric), linkage, metric), num_clusters, together).run()


class _ReciprocalMerging:
    """The active clusters, in slots `[B, M]` with the stale ones first, and the merges so far.

    A cluster keeps its nearest neighbour until that neighbour merges. Then it is stale, and its old distance is a lower
    bound on the new one.
    """

    def __init__(self, clusters: Clusters, num_clusters: int, together: int) -> None:
        batch, num_tokens = clusters.sizes.shape
        device = clusters.sizes.device
        self.clusters = clusters
        self.num_tokens = num_tokens
        self.num_clusters = num_clusters
        self.together = together
        self.num_merges = together * num_tokens - num_clusters  # of `together` items, which share them out by height
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
            stop = min(start + max(1, TILE_DISTANCES // (batch * (num_slots - start))), self.num_stale)
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
        for rows in where_first(tied).split(max(1, TILE_DISTANCES // self.ids.numel()), dim=1):
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
        kept = where_first(keep.byte() + stale)
        self.num_stale = int(stale.sum(dim=1).max())
        self.clusters.merge(kept, partners.gather(1, kept), heights.gather(1, kept))
        self.ids = self.ids.masked_fill(~keep, self.num_tokens).gather(1, kept)
        empty = self.ids == self.num_tokens
        self.bounds = self.bounds.gather(1, kept).masked_fill(empty, math.inf)
        self.formed = self.formed.gather(1, kept)
        self.neighbours = self.neighbours.gather(1, kept)
