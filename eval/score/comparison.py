"""How the pictures and the seconds of trials compare with the unmerged model's, and which of them are worth more."""

from collections.abc import Sequence

import pandas as pd

from draw.configuration import Configuration
from draw.trials import Trial
from score.nearness import pixels, psnr, ssim

DOUBT = 5.0  # dB that one picture may be from the mean of several
MEASURES = {"seconds": "median", "ratio": "median", "psnr": "mean", "ssim": "mean", "configuration": "first"}


def compare(trials: Sequence[Trial]) -> pd.DataFrame:
    """A row for every configuration, the fastest first: method, setting, seconds, ratio, psnr, ssim, configuration,
    pictures, frontier.

    `psnr` and `ssim` are to the unmerged picture, means over the prompts; seconds and ratio are medians.
    """
    unmerged = {trial.picture: trial for trial in trials if trial.configuration.is_unmerged}
    rows = pd.DataFrame([figures(trial, unmerged[trial.picture]) for trial in trials])
    how = {name: (name, by) for name, by in MEASURES.items()} | {"pictures": ("psnr", "size")}
    results = rows.groupby(["method", "setting"], sort=False).agg(**how).reset_index().sort_values("ratio")
    return results.assign(frontier=on_frontier(results["ratio"], results["psnr"]))


def figures(trial: Trial, unmerged: Trial) -> dict[str, object]:
    """One row of what `compare` aggregates."""
    images = pixels(trial.image), pixels(unmerged.image)
    return {
        "method": trial.configuration.label,
        "setting": trial.configuration.setting,
        "seconds": trial.seconds,
        "ratio": trial.seconds / unmerged.seconds,
        "psnr": float("nan") if trial is unmerged else psnr(*images),
        "ssim": float("nan") if trial is unmerged else ssim(*images),
        "configuration": trial.configuration,
    }


def promising(
    trials: Sequence[Trial], configurations: Sequence[Configuration], min_psnr: float
) -> Sequence[Configuration]:
    """The unmerged model and what is not slower, nor far from being near enough; nothing if that is all."""
    results = compare(trials)
    good = set(results[(results["psnr"] >= min_psnr - DOUBT) & (results["ratio"] < 1)]["configuration"])
    left = [each for each in configurations if each in good]
    return [Configuration(), *left] if left else []


def on_frontier(seconds: pd.Series, psnr: pd.Series) -> pd.Series:
    """Whether no other row is both as fast and nearer, nor faster and as near.

    NaN stands for the unmerged pictures themselves, nearer than any other; that row is not marked.
    """
    order = pd.DataFrame({"seconds": seconds, "error": -psnr.fillna(float("inf"))}).sort_values(["seconds", "error"])
    best_before = order["error"].cummin().shift(fill_value=float("inf"))
    return (order["error"] < best_before).reindex(seconds.index) & psnr.notna()
