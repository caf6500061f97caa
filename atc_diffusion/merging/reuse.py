"""Which clusters serve a call, and which of its items share them.

Clusters are reused by content: by calls whose inputs continue those that the clusters were made from.
"""

from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import Tensor

from atc_diffusion.adapters.noise import TRAINED
from atc_diffusion.calls.inputs import Inputs, changes, equal_items
from atc_diffusion.calls.position import Position
from atc_diffusion.clustering.tree import Cuttable
from atc_diffusion.merge_map import MergeMap

PATIENCE = 3  # steps for which clusters wait to serve again: forecasting may skip two in a row, guidance one
MAX_SOURCES = 128  # a loop that never leaves its timestep forgets its oldest clusters here,
MAX_BYTES = 2**28  # or where they and the inputs that are kept to compare with fill 256 MiB


@dataclass(frozen=True)
class Sharing:
    """Which items of a batch are clustered, and whose clusters each item uses.

    Attributes:
        clustered: `[U]` int64, items of the batch.
        used: `[B]` int64, for each item a place in `clustered`.
    """

    clustered: Tensor
    used: Tensor

    @classmethod
    def of(cls, latents: Tensor) -> "Sharing | None":
        """Items of equal `latents` `[B, C, ...]` share the clusters of the last of them; None if all differ."""
        rows = enumerate(equal_items(latents))
        last = [max(other for other, same in enumerate(row) if same or other == item) for item, row in rows]
        clustered = sorted(set(last))
        if len(clustered) == len(last):
            return None
        used = [clustered.index(item) for item in last]
        return cls(*(torch.tensor(index, device=latents.device) for index in (clustered, used)))

    def pick(self, tokens: Tensor) -> Tensor:
        """The clustered items of `tokens` `[B * F, N, C]`, with `F` frames an item."""
        return tokens.unflatten(0, (len(self.used), -1))[self.clustered].flatten(0, 1)

    def spread(self, labels: Tensor) -> Tensor:
        """Labels `[B * F, N]` of all items, from those of the clustered ones `[U * F, N]`."""
        return labels.unflatten(0, (len(self.clustered), -1))[self.used].flatten(0, 1)


@dataclass(frozen=True)
class CachedClusters:
    """The clusters made from the tokens of one call.

    Attributes:
        sharing: which items of the batch share clusters; None: each has its own.
        trees: by the name of what they cluster.
        maps: cuts of these trees, by that name and the number of clusters.
    """

    sharing: Sharing | None = None
    trees: dict[object, Cuttable] = field(default_factory=dict)
    maps: dict[tuple[object, int], MergeMap] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        kept = [getattr(each, "__dict__", {}).values() for each in (*self.trees.values(), *self.maps.values())]
        return sum(x.numel() * x.element_size() for x in chain.from_iterable(kept) if isinstance(x, Tensor))

    def keep_maps(self, counts: set[int]) -> None:
        """Forget the cuts of other `counts`, so that a schedule of fractions does not pile them up."""
        for key in [key for key in self.maps if key[1] not in counts]:
            del self.maps[key]


@dataclass
class Source:
    """What clusters were made from, and the last step at which they served."""

    inputs: Inputs
    time: float
    clusters: CachedClusters
    served: int

    @property
    def num_bytes(self) -> int:
        return self.inputs.num_bytes + self.clusters.num_bytes


class ClusterCache:
    """The clusters of one run that may serve again."""

    def __init__(self) -> None:
        self._sources: list[Source] = []

    def find(self, inputs: Inputs, position: Position, threshold: float, share_guidance: bool) -> CachedClusters:
        """Clusters for a call: those whose inputs have since changed by at most `threshold`, or new ones."""
        if not inputs.readable:
            return CachedClusters()
        self._sources = [each for each in self._sources if position.passed - each.served <= PATIENCE]
        source = self._continued(inputs, position.time, threshold)
        if source is not None:
            source.served = position.passed
            return source.clusters
        clusters = self._shared(inputs, position) if share_guidance else CachedClusters()
        if threshold:
            self._keep(Source(inputs.clone(), position.time, clusters, position.passed))
        return clusters

    def _continued(self, inputs: Inputs, time: float, threshold: float) -> Source | None:
        """The source nearest to `inputs`, if it is near enough, in the latents and in how noisy they are said to be."""
        candidates = [
            source
            for source in self._sources
            if source.inputs.kind == inputs.kind and not abs(source.time - time) > 2 * threshold * TRAINED
        ]
        if not candidates:
            return None
        distances = changes(inputs, [source.inputs for source in candidates])
        nearest = min(distances)
        return candidates[distances.index(nearest)] if nearest <= threshold else None

    def _shared(self, inputs: Inputs, position: Position) -> CachedClusters:
        """Clusters for all parts of guidance, which have equal latents, in one batch or in calls one after another.

        At the first step, so have different prompts of one seed.
        """
        if not position.passed:
            return CachedClusters()
        for source in self._sources:
            if source.time == position.time and source.inputs.same_latents(inputs):
                return source.clusters
        return CachedClusters(Sharing.of(inputs.latents))

    def _keep(self, source: Source) -> None:
        self._sources = [*self._sources[1 - MAX_SOURCES :], source]
        while len(self._sources) > 1 and sum(each.num_bytes for each in self._sources) > MAX_BYTES:
            del self._sources[0]
