"""The self-attentions of a network that a configuration merges: how many tokens each keeps, and which cannot merge."""

import math
import warnings
from collections import Counter

from torch import nn

from atc_diffusion.adapters import Family
from atc_diffusion.adapters.layer import Demands, Layer
from atc_diffusion.adapters.obstacles import Limit
from atc_diffusion.calls.position import Position
from atc_diffusion.config import MergeConfig

Kept = dict[int, tuple[int, int]]  # by level: how many queries and how many keys are kept
EXAMPLE = (64, 64)  # latents of 512 x 512 pixels, on which a configuration is checked before any are known


class PatchedLayers:
    """The merged layers of a network.

    Args:
        network: a module of the family.
        family: its adapter.
        layers: the self-attentions to be merged.
        config: how they are merged.

    Raises:
        ValueError: if one of them cannot merge as it would have to.
    """

    def __init__(self, network: nn.Module, family: Family, layers: list[Layer], config: MergeConfig) -> None:
        self._network = network
        self._family = family
        self._layers = layers
        self._config = config
        self._warned: set[str] = set()
        kept = self.kept(EXAMPLE, progress=0.0)
        for layer in layers:
            if obstacle := family.obstacle(layer, self._demands(layer, EXAMPLE, kept)):
                raise ValueError(f"{layer.name} {obstacle}")

    def __str__(self) -> str:
        """How many attentions merge, and to how many queries and keys."""
        numbers = Counter(layer.level for layer in self._layers)
        grids = {layer.level: math.prod(layer.grid(EXAMPLE)) for layer in self._layers}
        return "; ".join(
            f"{numbers[level]} attention{'s' * (numbers[level] > 1)} at level {level}, {grids[level]} tokens"
            f" -> {queries} queries, {keys} keys"
            for level, (queries, keys) in self.kept(EXAMPLE, progress=0.0).items()
        )

    def kept(self, size: tuple[int, int], progress: float | None) -> Kept:
        """How many queries and how many keys are kept of latents of a `size`, by level."""
        grids = {layer.level: layer.grid(size) for layer in self._layers}
        return {level: self._config.num_kept(math.prod(grid), level, progress) for level, grid in grids.items()}

    def fewest(self, size: tuple[int, int], position: Position, now: Kept) -> dict[int, int]:
        """The smallest number of clusters, by level, that a clustering made now may be cut down to."""
        if not self._config.scheduled:
            return {level: min(kept) for level, kept in now.items()}
        if position.entry is None:
            return dict.fromkeys(now, 1)
        entry, remaining = position.entry, len(position.entry.values) - position.entry.index
        later = [self.kept(size, entry.progress(steps)) for steps in range(remaining)]
        return {level: min(min(kept[level]) for kept in later) for level in now}

    def prepare(self, network: nn.Module, size: tuple[int, int], kept: Kept) -> dict[str, Limit]:
        """Give the layers of `network` what merging needs besides hooks; returns those that merge less, and why."""
        limits = {}
        for layer in self._of(network):
            limit = self._family.limit(layer, self._demands(layer, size, kept))
            if limit is not None:
                limits[layer.name] = limit
            if limit is None or limit.keys_merge:
                self._family.attach(layer.attention, self._config.widen_heads)
        self._warn(limits)
        return limits

    def detach(self) -> None:
        for layer in self._layers:
            self._family.detach(layer.attention)

    def _of(self, network: nn.Module) -> list[Layer]:
        """The layers of the network, or of a replica of it that `nn.DataParallel` has made."""
        if network is self._network:
            return self._layers
        levels = {layer.level for layer in self._layers}
        return [layer for layer in self._family.layers(network) if layer.level in levels]

    def _demands(self, layer: Layer, size: tuple[int, int], kept: Kept) -> Demands:
        queries, keys = kept[layer.level]
        return Demands(queries < math.prod(layer.grid(size)), queries != keys, self._config.widen_heads)

    def _warn(self, limits: dict[str, Limit]) -> None:
        """Say once what keeps layers from merging, unless hooks do, which `summary` reports."""
        obstacles = {name: limit.reason for name, limit in limits.items() if not limit.by_hooks}
        for reason in set(obstacles.values()) - self._warned:
            self._warned.add(reason)
            names = [name for name, obstacle in obstacles.items() if obstacle == reason]
            one = f"{names[0]} stays unmerged: it"
            several = f"{len(names)} attentions, the first {names[0]}, stay unmerged: each"
            warnings.warn(f"{several if names[1:] else one} {reason}", stacklevel=2)
