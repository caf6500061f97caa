"""The reports' plots: our methods in one strong colour, all others in grey, labels beside the points."""

from collections.abc import Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

OURS, OTHERS = "#c2255c", "#868e96"
LINE_HEIGHT, CHARACTER = 11.0, 5.4  # points, of a label


def plot_fidelity(frame: pd.DataFrame) -> Figure | None:
    """PSNR against time; labels name the settings on the frontier, and the best of every other method."""
    best = frame.sort_values("psnr").drop_duplicates("method", keep="last").index
    names = (frame["method"] + ", " + frame["setting"]).str.removesuffix(", ")
    labels = names.where(frame["frontier"] | frame.index.isin(best), "")
    points = frame.assign(x=frame["ratio"], y=frame["psnr"], margin=frame["psnr_margin"], label=labels)
    return plot(points, "time per image (unmerged = 1)", "PSNR to the unmerged image (dB)")


def plot_lines(points: pd.DataFrame, x: str, y: str, unmerged: float) -> Figure | None:
    """As `plot`, without methods of one point; labels name each method at its last point to the right."""
    last = points.sort_values("x").drop_duplicates("method", keep="last").index
    labelled = points.assign(label=points["method"].where(points.index.isin(last), ""))
    counts = points.groupby("method")["x"].transform("nunique")
    return plot(labelled[counts > 1], x, y, unmerged)


def plot(points: pd.DataFrame, x: str, y: str, unmerged: float | None = None) -> Figure | None:
    """A line with intervals for each method; None if there are not two points to compare.

    `points` has "method", "x", "y", "margin" and "label"; `x` and `y` are the titles of the axes, and `unmerged` is the
    unmerged model's y, which becomes a line.
    """
    if len(points) < 2:
        return None
    figure = Figure(figsize=(8.3, 4.2), layout="constrained")
    axes = figure.subplots()
    for method, line in points.sort_values("x").groupby("method", sort=False):
        style = {"color": OURS, "zorder": 3} if is_ours(str(method)) else {"color": OTHERS}
        marker = "-o" if len(line) > 1 else "o"
        axes.errorbar(line["x"], line["y"], line["margin"], fmt=marker, markersize=5, capsize=2, linewidth=1.2, **style)
    if unmerged is not None:
        axes.axhline(unmerged, color="black", linestyle="--", linewidth=1)
        axes.annotate("unmerged", (0, unmerged), (4, 3), xycoords=("axes fraction", "data"), textcoords="offset points")
    axes.set(xlabel=x, ylabel=y)
    axes.spines[["top", "right"]].set_visible(False)
    figure.draw_without_rendering()  # scales the axes
    label_points(axes, points[points["label"] != ""])
    return figure


def label_points(axes: Axes, points: pd.DataFrame) -> None:
    """Write each label to the right of its point, as far below others as keeps them apart."""
    labels = [str(label).removeprefix("ATCConfig.") for label in points["label"]]
    widths = [CHARACTER * len(label) for label in labels]
    left, right = axes.get_xlim()
    space = 72 * axes.get_window_extent().width / axes.figure.dpi
    ends = [left + (x - left) / (1 - width / space) for x, width in zip(points["x"], widths, strict=True)]
    axes.set_xlim(left, max([right, *ends]))
    places = axes.transData.transform(points[["x", "y"]].to_numpy(float)) * 72 / axes.figure.dpi
    heights = spread([(float(x), float(y), width) for (x, y), width in zip(places, widths, strict=True)])
    for (_, row), label, place, height in zip(points.iterrows(), labels, places, heights, strict=True):
        axes.annotate(
            label,
            (row["x"], row["y"]),
            (7, height - place[1]),
            textcoords="offset points",
            va="center",
            fontsize=9,
            color=OURS if is_ours(row["method"]) else "#495057",
            path_effects=[withStroke(linewidth=2.5, foreground="white")],
        )


def spread(labels: Sequence[tuple[float, float, float]]) -> list[float]:
    """Heights of labels, given by left end, wanted height and width: moved down until no two overlap."""
    heights: dict[int, float] = {}
    for index in sorted(range(len(labels)), key=lambda index: -labels[index][1]):
        left, height, width = labels[index]
        for other, taken in sorted(heights.items(), key=lambda item: -item[1]):
            beside = labels[other][0] < left + width and left < labels[other][0] + labels[other][2]
            if beside and abs(height - taken) < LINE_HEIGHT:
                height = taken - LINE_HEIGHT
        heights[index] = height
    return [heights[index] for index in range(len(labels))]


def is_ours(method: str) -> bool:
    return method.startswith(("ATC", "ViTConfig(linkage", "ViTConfig()"))


def on_frontier(seconds: pd.Series, psnr: pd.Series) -> pd.Series:
    """Whether no other row is both as fast and closer, nor faster and as close.

    The unmerged images have a PSNR of NaN; they are closer than any other, but not marked themselves.
    """
    order = pd.DataFrame({"seconds": seconds, "error": -psnr.fillna(float("inf"))}).sort_values(["seconds", "error"])
    best_before = order["error"].cummin().shift(fill_value=float("inf"))
    return (order["error"] < best_before).reindex(seconds.index) & psnr.notna()
