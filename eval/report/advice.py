"""What to use on this model and machine: in words, as code, as a table and as a page."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, cast

import pandas as pd

from draw.configuration import Configuration
from draw.experiment import this_command
from draw.trials import Trial
from report.page import Page, Section, Shown
from report.plots import plot_fidelity
from score.comparison import figures

FASTER = 0.97  # of the unmerged time; anything nearer to 1 may be noise
TEXT = """\
Median seconds per picture, and the median ratio to the unmerged picture of the same prompt; PSNR and SSIM to that
picture, means over the prompts. What was slower than the unmerged model or far from it was drawn for the first prompt
only. A star marks the frontier: nothing else tried is both as fast and closer."""
TOGETHER = {  # what to add to the line that merges, by rival
    "steps": "  # and draw with {strength:g} of the steps",
    "deepcache": """
deepcache = DeepCache.DeepCacheSDHelper(pipe=pipe)
deepcache.set_params(cache_interval={strength:g})
deepcache.enable()""",
}


def advice(results: pd.DataFrame, min_psnr: float) -> tuple[str, str]:
    """What to do, in words, and the lines of code to paste ("" where merging does not pay)."""
    faster = results[results["ratio"] < FASTER]
    faster = faster.assign(merges=[each.merge is not None for each in faster["configuration"]])
    near = faster[faster["psnr"] >= min_psnr].sort_values("ratio")
    merging, rivals = near[near["merges"]], near[~near["merges"]]
    if len(merging):
        best = merging.iloc[0]
        is_ahead = len(rivals) and rivals.iloc[0]["ratio"] < best["ratio"]
        ahead = f" Faster without merging: {_sentence(rivals.iloc[0])}." if is_ahead else ""
        words = f"The fastest merging at {min_psnr:g} dB or better: {_sentence(best)}.{ahead}"
        return words, code(best["configuration"])
    rival = f" Without merging, {_sentence(rivals.iloc[0])}." if len(rivals) else ""
    return f"{_why_not(faster[faster['merges']], min_psnr)}{rival}", ""


def _why_not(merging: pd.DataFrame, min_psnr: float) -> str:
    """Why no merging is recommended, and what would make one acceptable."""
    if not len(merging):
        return "Merging does not pay here: no setting is faster than the unmerged model."
    closest = merging.sort_values("psnr").iloc[-1]
    accepting = f"--min-psnr {int(closest['psnr'])} accepts it"
    return f"No merging is faster at {min_psnr:g} dB or better. The closest: {_sentence(closest)}; {accepting}."


def _sentence(row: pd.Series) -> str:
    return f"{row['method']} ({row['setting']}) takes {row['ratio']:.2f} of the time at {row['psnr']:.1f} dB"


def code(configuration: Configuration) -> str:
    """The lines that merge so, together with a rival where there is one; "" for a rival alone."""
    merge, rival = configuration.merge, configuration.rival
    if merge is None:
        return ""
    default = type(merge)()
    changed = [field.name for field in fields(merge) if getattr(merge, field.name) != getattr(default, field.name)]
    line = f"atc_diffusion.apply_patch(pipe, {', '.join(f'{name}={getattr(merge, name)!r}' for name in changed)})"
    return line if rival is None else line + TOGETHER[rival.name].format(strength=rival.strength)


def as_rows(results: pd.DataFrame) -> list[dict[str, Any]]:
    """`results` for a JSON file, with the lines of code instead of the configuration."""
    codes = [code(each) for each in results["configuration"]]
    rows = results.drop(columns="configuration").assign(code=codes)
    return cast(list[dict[str, Any]], json.loads(rows.to_json(orient="records", double_precision=6)))


def written(results: pd.DataFrame) -> pd.DataFrame:
    """`results` as a table of texts."""
    columns = {"seconds": ("s/picture", 2), "ratio": ("ratio", 2), "psnr": ("PSNR (dB)", 1), "ssim": ("SSIM", 3)}
    table = results[["method", "setting", "pictures"]].copy()
    for column, (name, digits) in columns.items():
        table[name] = results[column].map(f"{{:.{digits}f}}".format, na_action="ignore").fillna("")
    return table.assign(frontier=results["frontier"].map({True: "*", False: ""}))


def make_page(trials: Sequence[Trial], results: pd.DataFrame, conditions: Mapping[str, str], min_psnr: float) -> Page:
    words, lines = advice(results, min_psnr)
    plot = plot_fidelity(results[results["psnr"].notna()])
    sections = [
        Section("What to use", words, code=lines),
        Section("Time and fidelity", TEXT, table=written(results), figure=plot),
    ]
    for picture in dict.fromkeys(trial.picture for trial in trials):
        drawn = [trial for trial in trials if trial.picture == picture]
        shown = [Shown(_caption(trial, drawn[0]), trial.image) for trial in drawn]
        sections.append(Section(f'"{picture.prompt}", seed {picture.seed}', pictures=shown))
    return Page("Which setting?", conditions, [this_command()], sections)


def _caption(trial: Trial, unmerged: Trial) -> str:
    row = figures(trial, unmerged)
    if trial is unmerged:
        return f"unmerged: {trial.seconds:.2f} s"
    return f"{row['method']}, {row['setting']}: {row['ratio']:.2f} of the time, {row['psnr']:.1f} dB"
