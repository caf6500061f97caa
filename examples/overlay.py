"""The clusters that merging made, drawn over the picture they belong to (as in the ATC paper's Figure 5)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from skimage.color import label2rgb
from skimage.segmentation import find_boundaries

from atc_diffusion import MergeMap, RecordedMerge, merge_maps

Array = NDArray[np.float64]
Labels = NDArray[np.int32]


@dataclass(frozen=True)
class Partition:
    """Which tokens of a picture one attention merged; for a batch, of its last item.

    Attributes:
        layer: the attention's path in the pipeline.
        tokens: whether the clusters are those of the "queries", of the "keys and values", or of "all tokens".
        step: the first step that used the clusters, counted from 0; they may serve the following steps too.
        labels: cluster of every token, `[H, W]`.
    """

    layer: str
    tokens: str
    step: int
    labels: Labels

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Number of tokens in every cluster, `[K]`."""
        return np.bincount(self.labels.ravel())

    @property
    def name(self) -> str:
        """Layer and tokens, short enough for a menu."""
        layer = self.layer.removesuffix(".attn1").replace(".transformer_blocks", "").replace("_blocks", "")
        return f"{layer}: {self.tokens}"


def partitions(pipe: Any) -> list[Partition]:
    """What the last run of a pipeline, patched with `record=True`, merged: by step, then in the order of the layers.

    Clusters that serve several steps are there once.
    """
    first: dict[tuple[str, str, int], RecordedMerge] = {}
    return [
        Partition(layer, tokens, record.step, _labels(merge_map, record.grid))
        for record in merge_maps(pipe)
        for layer in [path(record.network, record.layer)]
        for tokens, merge_map in _merged(record.queries, record.keys).items()
        if first.setdefault((layer, tokens, id(merge_map)), record) is record
    ]


def path(network: str, layer: str) -> str:
    """Where a layer is in the pipeline; a network that was patched by itself has no name."""
    return f"{network}.{layer}" if network else layer


def at_step(found: Sequence[Partition], step: int) -> Partition:
    """The one of a layer's partitions that was in use at `step`: the newest that is not from a later step."""
    return max((each for each in found if each.step <= step), key=lambda each: each.step, default=found[0])


def paint(picture: Image.Image, labels: Labels, side: int = 512) -> Image.Image:
    """`picture` at about `side` pixels with every cluster in its mean colour, and lines between clusters.

    Args:
        picture: what was drawn.
        labels: cluster of every token, `[H, W]`.
        side: of the longer edge, in pixels; rounded to whole tokens.
    """
    scale = max(1, side // max(labels.shape))
    labels = labels.repeat(scale, axis=0).repeat(scale, axis=1)
    pixels = np.asarray(picture.convert("RGB").resize(labels.shape[::-1], Image.Resampling.BICUBIC)) / 255
    means = label2rgb(labels, pixels, kind="avg", bg_label=-1)
    lines = find_boundaries(labels, mode="inner", background=-1)[..., None]
    return Image.fromarray((np.where(lines, _contrasting(means), means) * 255).astype(np.uint8))


def _merged(queries: MergeMap | None, keys: MergeMap | None) -> dict[str, MergeMap]:
    """What was merged of one attention, once where queries and keys were merged alike."""
    if queries is not None and queries is keys:
        return {"all tokens": queries}
    named = {"queries": queries, "keys and values": keys}
    return {tokens: merge_map for tokens, merge_map in named.items() if merge_map is not None}


def _labels(merge_map: MergeMap, grid: tuple[int, int]) -> Labels:
    """The last item, which under guidance is the prompt's."""
    return merge_map.labels[-1].reshape(grid).to("cpu").numpy().astype(np.int32)


def _contrasting(colours: Array) -> Array:
    """A darker shade of light colours and a lighter one of dark colours."""
    is_light = colours.mean(axis=2, keepdims=True) > 0.4
    return np.where(is_light, 0.75 * colours, 0.75 * colours + 0.25)
