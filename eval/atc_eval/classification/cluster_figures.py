"""The clusters of each method after each stage, as in Figure 5 of the ATC paper."""

from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from atc_diffusion.painting import paint_clusters
from atc_eval.classification.evaluation import Evaluation, Task
from atc_eval.method import Method

STAGES = (4, 7, 10)
MOST_ROWS = 4  # of methods
PIXELS = 288  # a side of an image in the figure


def plot_clusters(evaluations: Sequence[Evaluation], task: Task) -> list[Figure]:
    """A figure for each image to show: a row for each method at the lowest fraction kept, a column for each stage."""
    methods = [each.trial.method for each in evaluations if not each.trial.finetuned]
    lowest = min((each.keep for each in methods if each.keep is not None), default=None)
    chosen = [each for each in methods if each.keep == lowest][:MOST_ROWS]
    return [_figure(task, chosen, number) for number in task.shown] if lowest is not None else []


def _figure(task: Task, methods: Sequence[Method], number: int) -> Figure:
    image, _ = task.images[number]
    shown = Image.fromarray((255 * task.visible(image)).round().astype(np.uint8)).resize((PIXELS, PIXELS))
    figure = Figure(figsize=(6.5, 1.6 * len(methods) + 0.3), layout="constrained", dpi=100)
    grid = figure.subplots(len(methods), len(STAGES) + 1, squeeze=False)
    for axes, title in zip(grid[0], ["image", *(f"after block {stage}" for stage in STAGES)], strict=True):
        axes.set_title(title, fontsize="small")
    for row, method in zip(grid, methods, strict=True):
        row[0].set_ylabel(f"{method.label.removeprefix('ViTConfig')}\n{method.setting}", fontsize="small")
        painted = [paint_clusters(shown, labels, PIXELS) for labels in cluster_labels(task.model, method, image)]
        for axes, content in zip(row, [shown, *painted], strict=True):
            axes.set(xticks=[], yticks=[])
            axes.imshow(content, interpolation="nearest")
    return figure


@torch.no_grad()
def cluster_labels(model: VisionTransformer, method: Method, image: Tensor) -> list[NDArray[np.int64]]:
    """The cluster of each patch after each stage, `[h, w]`: patches of one cluster have equal features."""
    image, indices = image[None].to(next(model.parameters()).device), [stage - 1 for stage in STAGES]
    with method.applied(model):
        maps = model.forward_intermediates(image, indices=indices, intermediates_only=True)
    labels = (each[0].flatten(1).unique(dim=1, return_inverse=True)[1].view(each.shape[2:]) for each in maps)
    return [each.cpu().numpy() for each in labels]
