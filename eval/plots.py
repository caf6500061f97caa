"""The report's figures."""

import io
from pathlib import Path

from cycler import cycler
from matplotlib import color_sequences
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pictures import Picture, write_atomically
from results import Result, Study


def plot_fid(study: Study) -> Figure:
    """FID against the share of tokens kept; bars are the paired intervals of the difference from the unmerged set."""
    figure, axes = _figure(study, "tokens kept (%)", f"FID, n = {study.unmerged.scores.n}")
    for label, line in study.lines.items():
        results = _from_most_kept(line)
        keeps, fid = [result.keep for result in results], [result.scores.fid.value for result in results]
        margins = [0.0, *(result.fidelity.fid_change.margin for result in results[1:])]
        axes.errorbar(keeps, fid, margins, markersize=4, capsize=3, label=label)
    axes.axhline(study.unmerged.scores.fid.value, color="grey", linestyle="--", label="unmerged")
    axes.invert_xaxis()
    _legend(figure, axes)
    return figure


def plot_fidelity(study: Study) -> Figure:
    """PSNR to the unmerged picture against seconds per picture; each point is named by its share kept."""
    figure, axes = _figure(study, "seconds per picture", "PSNR to the unmerged picture (dB)")
    for label, line in study.lines.items():
        results = [each for each in _from_most_kept(line)[1:] if each.record["seconds_per_picture"] is not None]
        if not results:
            continue
        seconds = [result.record["seconds_per_picture"] for result in results]
        psnr = [result.fidelity.psnr.value for result in results]
        axes.plot(seconds, psnr, markersize=4, label=label)
        for x, y, result in zip(seconds, psnr, results, strict=True):
            axes.annotate(f"{result.keep:g}", (x, y), xytext=(3, 3), textcoords="offset points", fontsize=7)
    unmerged = study.unmerged.record["seconds_per_picture"]
    if unmerged is not None:
        axes.axvline(unmerged, color="grey", linestyle="--", label="unmerged")
    _legend(figure, axes)
    return figure


def picture_grid(study: Study, picture: Picture) -> Figure:
    """One picture as every way of merging (rows) makes it at every share kept (columns), as in the paper's Figure 6."""
    lines, keeps = study.lines, study.keeps
    figure = Figure(figsize=(1.2 * len(keeps) + 2.5, 1.2 * len(lines) + 0.4), layout="constrained", dpi=120)
    grid = figure.subplots(len(lines), len(keeps), squeeze=False)
    for row, (label, line) in zip(grid, lines.items(), strict=True):
        row[0].set_ylabel(label, rotation="horizontal", ha="right", va="center", wrap=True, fontsize="small")
        for axes, keep in zip(row, keeps, strict=True):
            _show(axes, line.get(keep), picture)
    for axes, keep in zip(grid[0], keeps, strict=True):
        axes.set_title(f"{keep:g} %")
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Write `figure` as PNG."""
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    write_atomically(path, file.getvalue())


def _show(axes: Axes, result: Result | None, picture: Picture) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    if result is not None:
        axes.imshow(result.pictures.load(picture), interpolation="nearest")


def _figure(study: Study, x: str, y: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(8, 4.5 + 0.16 * len(study.lines)), layout="constrained", dpi=120)
    axes = figure.subplots()
    axes.set_prop_cycle(cycler(marker=["o", "s", "^", "v"]) * cycler(color=color_sequences["tab10"]))
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    return figure, axes


def _legend(figure: Figure, axes: Axes) -> None:
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower left", fontsize=7)


def _from_most_kept(line: dict[float, Result]) -> list[Result]:
    return [line[keep] for keep in sorted(line, reverse=True)]
