"""Pictures of the clusters of each method after each stage, as in Figure 5 of the ATC paper."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from skimage.color import label2rgb
from skimage.segmentation import mark_boundaries
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from classification.evaluation import Evaluation, Task
from classification.methods import Way

STAGES = (4, 7, 10)
PIXELS = 288  # a side of a picture in the figure


def plot_clusters(evaluations: Sequence[Evaluation], task: Task) -> list[Figure]:
    """A figure for each picture to show: a row for each method at the lowest share kept, a column for each stage."""
    keeps = [each.way.keep for each in evaluations if each.way.keep is not None]
    ways = [each.way for each in evaluations if each.way.keep == min(keeps, default=None) and not each.way.finetuned]
    return [_figure(task, ways, number) for number in task.shown] if keeps else []


def _figure(task: Task, ways: Sequence[Way], number: int) -> Figure:
    image, _ = task.pictures[number]
    shown = (
        task.visible(image).repeat(-(-PIXELS // image.shape[1]), axis=0).repeat(-(-PIXELS // image.shape[2]), axis=1)
    )
    figure = Figure(figsize=(6.5, 1.6 * len(ways) + 0.3), layout="constrained", dpi=100)
    grid = figure.subplots(len(ways), len(STAGES) + 1, squeeze=False)
    for axes, title in zip(grid[0], ["picture", *(f"after block {stage}" for stage in STAGES)], strict=True):
        axes.set_title(title, fontsize="small")
    for row, way in zip(grid, ways, strict=True):
        row[0].set_ylabel(f"{way.label}\n{way.column}", fontsize="small")
        _show(row[0], shown)
        for axes, labels in zip(row[1:], cluster_labels(task.model, way, image), strict=True):
            _show(axes, paint(shown, labels))
    return figure


@torch.no_grad()
def cluster_labels(model: VisionTransformer, way: Way, image: Tensor) -> list[NDArray[np.int64]]:
    """The cluster of each patch after each stage, `[h, w]`: patches of one cluster have equal features."""
    image, indices = image[None].to(next(model.parameters()).device), [stage - 1 for stage in STAGES]
    with way.applied(model):
        maps = model.forward_intermediates(image, indices=indices, intermediates_only=True)
    labels = (each[0].flatten(1).unique(dim=1, return_inverse=True)[1].view(each.shape[2:]) for each in maps)
    return [each.cpu().numpy() for each in labels]


def paint(picture: NDArray[np.floating[Any]], labels: NDArray[np.int64]) -> NDArray[np.floating[Any]]:
    """The picture `[H, W, 3]` with each cluster in its mean colour and the clusters' borders."""
    rows, columns = (np.arange(size) * count // size for size, count in zip(picture.shape, labels.shape, strict=False))
    pixels = labels[rows[:, None], columns]
    return mark_boundaries(
        label2rgb(pixels, picture, kind="avg", bg_label=-1), pixels, color=(0.2, 0.2, 0.2), mode="inner"
    )


def _show(axes: Axes, picture: NDArray[np.floating[Any]]) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    axes.imshow(picture, interpolation="nearest")
