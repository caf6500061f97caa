"""Shows clusters of tokens in the image that they belong to (as in Haurum et al. 2024, Figure 5)."""

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

COLOURS = np.array(  # Tableau's ten, grey first: the largest cluster is often the background
    [
        (127, 127, 127), (31, 119, 180), (255, 127, 14), (44, 160, 44), (214, 39, 40),
        (148, 103, 189), (140, 86, 75), (227, 119, 194), (188, 189, 34), (23, 190, 207),
    ]
)  # fmt: skip
OPACITY = 0.75


def paint_clusters(image: Image.Image, labels: ArrayLike, side: int = 512, most: int = 10) -> Image.Image:
    """`image` with its largest clusters in colour, each with a white outline; all other tokens stay as they are.

    Args:
        image: what was drawn.
        labels: the cluster of every token, `[H, W]`.
        side: the longer edge of the result, in pixels; rounded down to whole tokens.
        most: how many clusters are coloured; those of a single token never are.
    """
    tokens = np.asarray(labels)
    scale = max(1, side // max(tokens.shape))
    ranks = _ranks(tokens, most).repeat(scale, axis=0).repeat(scale, axis=1)
    pixels = np.asarray(image.convert("RGB").resize(ranks.shape[::-1], Image.Resampling.BICUBIC))
    coloured = np.where(ranks[..., None] < 0, pixels, pixels + OPACITY * (COLOURS[ranks % len(COLOURS)] - pixels))
    return Image.fromarray(np.where(_outline(ranks)[..., None], 255, coloured).astype(np.uint8))


def _ranks(labels: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """For every token, the rank of its cluster by size, from 0; -1 for clusters that are not coloured."""
    _, clusters, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    ranks = np.full(len(sizes), -1)
    largest = np.argsort(-sizes, kind="stable")[:most]
    ranks[largest] = np.where(sizes[largest] > 1, np.arange(len(largest)), -1)
    return ranks[clusters.reshape(labels.shape)]


def _outline(ranks: NDArray[np.int64]) -> NDArray[np.bool_]:
    """The pixels of coloured clusters whose right or lower neighbour belongs to another."""
    outline = np.zeros(ranks.shape, bool)
    outline[:, :-1] |= ranks[:, :-1] != ranks[:, 1:]
    outline[:-1] |= ranks[:-1] != ranks[1:]
    return outline
