"""The report of accuracy: tables, speed, and figures like the ATC paper's Figures 4 and 5."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from atc_diffusion import ViTConfig
from atc_diffusion.commands import write_atomically
from atc_diffusion.painting import paint_clusters
from atc_eval.classification.evaluation import MERGING, PRUNING, Evaluation, Task, mean_by_subject
from atc_eval.environment import in_words, versions
from atc_eval.method import Method
from atc_eval.report.page import Page, Section
from atc_eval.report.plots import plot_lines
from atc_eval.score.statistics import Estimate, bootstrap_draws

DRAWS = 1000
BASELINES = {"merging": MERGING[1:], "pruning": PRUNING}
# Top-1 with MAE backbones, off the shelf (Haurum et al. 2024, Table 1); t is 16 in ViT-B, 8 in ViT-L, 7 in ViT-H.
PAPER_TABLE_1 = Path(__file__).with_name("paper_table_1.csv")
ACCURACY_TEXT = """\
Top-1 in percent, ± half the 95 % interval by bootstrap over the subjects of the images. Columns are fractions of
tokens kept at the 4th, 7th and 10th block, or tokens removed in every block."""
LEAD_TEXT = """\
In percentage points over the best other method of the column, paired image by image; a star marks 95 % intervals that
exclude zero. The best other method is chosen on these same images, which favours it. Each interval holds on its own,
not all at once."""
SPEED_TEXT = """\
Median over the batches, on one device, clustering included; rough if other processes ran beside it. Unmerged:
{:.0f}."""


def write_report(evaluations: Sequence[Evaluation], task: Task, command: str, device: str, folder: Path) -> None:
    """Write `results.csv`, and the report as HTML and Markdown to `folder`."""
    table = frame(evaluations, task)
    write_atomically(folder / "results.csv", table.to_csv(index=False, float_format="%.2f").encode())
    unmerged, rows = table.iloc[0], table[1:]
    accuracy = _pivot(rows, [_written(row) for _, row in rows.iterrows()])
    speeds = _pivot(rows, [f"{speed:.0f}" for speed in rows.images_per_second])
    clusters = enumerate(plot_clusters(evaluations, task), start=1)
    sections = [
        Section("Off the shelf", f"{ACCURACY_TEXT} Unmerged: {_written(unmerged)}.", table=accuracy),
        Section("ATC's lead, off the shelf", LEAD_TEXT, table=leads(evaluations, task)),
        *paper_section(table),
        Section("Images per second", SPEED_TEXT.format(unmerged.images_per_second), table=speeds),
        accuracy_plot(table),
        *(Section(f"Clusters {number}", figure=figure) for number, figure in clusters),
    ]
    conditions = {"task": task.name, "device": device, "versions": in_words(versions(("torch", "timm")))}
    Page("Classification with fewer tokens", conditions, [command], sections).write(folder)


def frame(evaluations: Sequence[Evaluation], task: Task) -> pd.DataFrame:
    """A row for each method, the unreduced model first."""
    draws = bootstrap_draws(len(set(task.subjects)), DRAWS)
    rows = [
        {
            "label": each.method.label,
            "column": each.method.setting,
            "keep": each.method.keep,
            "accuracy": each.accuracy,
            "margin": mean_by_subject(100.0 * each.correct, task.subjects, draws).margin,
            "images_per_second": each.images_per_second,
        }
        for each in evaluations
    ]
    return pd.DataFrame(rows)


def paper_section(table: pd.DataFrame) -> Iterator[Section]:
    published = pd.read_csv(PAPER_TABLE_1, index_col=0)
    columns = [column for column in published if column in set(table.column)]
    if columns:
        yield Section("The paper's Table 1, off the shelf", table=_named(published[columns].map("{:.1f}".format)))


def leads(evaluations: Sequence[Evaluation], task: Task) -> pd.DataFrame:
    """ATC's lead, by linkage, over the best merging and the best pruning baseline of every column."""
    draws = bootstrap_draws(len(set(task.subjects)), DRAWS)
    cells: dict[str, dict[str, str]] = {}
    for own in evaluations:
        setting = own.method.setting
        for kind, names in BASELINES.items() if _name(own) == "atc" else ():
            if others := [each for each in evaluations if _name(each) in names and each.method.setting == setting]:
                best = max(others, key=lambda each: each.accuracy)
                gain = mean_by_subject(100.0 * own.correct - 100.0 * best.correct, task.subjects, draws)
                row = cells.setdefault(f"{own.method.label} over the best {kind}", {})
                row[setting] = f"{gain:+.1f}{gain.star} ({_name(best)})"
    return _named(pd.DataFrame(cells).T.fillna(""))


def _name(evaluation: Evaluation) -> str | None:
    """As in `ViTConfig`; None for the unreduced model."""
    config = evaluation.method.config
    return config.method if isinstance(config, ViTConfig) else None


def accuracy_plot(table: pd.DataFrame) -> Section:
    """Accuracy against the fraction kept, a line for each method, as in the paper's Figure 4."""
    points = table.assign(method=table.label, x=table.keep, y=table.accuracy).dropna(subset="keep")
    figure = plot_lines(points, "tokens kept at each stage (%)", "top-1 (%)", table.accuracy.iloc[0])
    return Section("Accuracy by fraction kept", figure=figure)


def _written(row: Any) -> str:
    return f"{Estimate(row.accuracy, row.margin):.1f}"


def _pivot(rows: pd.DataFrame, cells: list[str]) -> pd.DataFrame:
    """Methods by columns, both in the order of their first row."""
    table = rows.assign(cell=cells).pivot(index="label", columns="column", values="cell")
    return _named(table.reindex(index=rows.label.unique(), columns=rows.column.unique()).fillna(""))


def _named(table: pd.DataFrame) -> pd.DataFrame:
    """The table with its row names as first column."""
    return table.rename_axis(index=None, columns=None).reset_index(names="")


STAGES = (4, 7, 10)
MOST_ROWS = 4  # of methods
PIXELS = 288  # a side of an image in the figure


def plot_clusters(evaluations: Sequence[Evaluation], task: Task) -> list[Figure]:
    """A figure for each image to show: a row for each method at the lowest fraction kept, a column for each stage."""
    methods = [each.method for each in evaluations]
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
