"""The reports' plots."""

import pandas as pd
from cycler import cycler
from matplotlib import color_sequences
from matplotlib.axes import Axes
from matplotlib.figure import Figure


def plot_fid(fid: pd.DataFrame, unmerged: float) -> Figure:
    """FID against the share of tokens kept.

    Args:
        fid: rows with "method", "keep" (percent), "fid" and "margin" (of the paired difference from the unmerged set).
        unmerged: FID of the unmerged set.
    """
    figure, axes = line_figure(fid["method"].nunique(), "tokens kept (%)", "FID")
    for method, line in fid.groupby("method", sort=False):
        line = line.sort_values("keep", ascending=False)
        axes.errorbar(line["keep"], line["fid"], line["margin"], markersize=4, capsize=3, label=str(method))
    axes.axhline(unmerged, color="grey", linestyle="--", label="unmerged")
    axes.invert_xaxis()
    add_legend(figure, axes)
    return figure


def plot_fidelity(frame: pd.DataFrame) -> Figure:
    """PSNR against time, for rows with "method", "setting", "ratio", "psnr" and "frontier"."""
    figure, axes = line_figure(
        frame["method"].nunique(), "seconds per picture, of the unmerged model's", "PSNR to the unmerged picture (dB)"
    )
    best = frame[frame["frontier"]].sort_values("ratio")
    axes.step(
        best["ratio"], best["psnr"], where="post", color="lightgrey", linewidth=5, marker="", label="the frontier"
    )
    for method, line in frame.groupby("method", sort=False):
        line = line.sort_values("ratio")
        axes.plot(line["ratio"], line["psnr"], markersize=4, label=str(method))
        for _, row in line.iterrows():
            position = (row["ratio"], row["psnr"])
            axes.annotate(row["setting"], position, xytext=(4, 3), textcoords="offset points", fontsize=6)
    axes.axvline(1, color="grey", linestyle="--", label="unmerged")
    add_legend(figure, axes)
    return figure


def on_frontier(seconds: pd.Series, psnr: pd.Series) -> pd.Series:
    """Whether no other row is both as fast and closer, nor faster and as close.

    The unmerged pictures have a PSNR of NaN; they are closer than any other, but not marked themselves.
    """
    order = pd.DataFrame({"seconds": seconds, "error": -psnr.fillna(float("inf"))}).sort_values(["seconds", "error"])
    best_before = order["error"].cummin().shift(fill_value=float("inf"))
    return (order["error"] < best_before).reindex(seconds.index) & psnr.notna()


def line_figure(lines: int, x: str, y: str) -> tuple[Figure, Axes]:
    """An empty plot for so many lines, each of its own marker and colour."""
    figure = Figure(figsize=(9, 4.5 + 0.08 * lines), layout="constrained")
    axes = figure.subplots()
    axes.set_prop_cycle(cycler(marker=["o", "s", "^", "v"]) * cycler(color=color_sequences["tab10"]))
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    return figure, axes


def add_legend(figure: Figure, axes: Axes) -> None:
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower left", ncols=2, fontsize=7)
