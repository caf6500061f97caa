"""The report of a study: results as JSON and CSV, and a page of tables, plots and pictures."""

from itertools import combinations
from pathlib import Path

import pandas as pd

from draw.configuration import Configuration, describe
from draw.pictures import Picture
from files import write_atomically
from report.page import Page, Section, Shown
from report.plots import on_frontier, plot_fid, plot_fidelity
from report.study import Result, Study
from score.bootstrap import Estimate

PAPER_TABLE_2 = {  # FID by percent kept (Haurum et al. 2024, Table 2)
    "ToMe": {100: 33.80, 90: 33.77, 80: 33.61, 70: 33.59, 60: 33.57, 50: 33.63, 40: 33.67},
    "ATC single": {100: 33.80, 90: 33.63, 80: 33.48, 70: 33.53, 60: 33.43, 50: 34.01, 40: 36.95},
    "ATC average": {100: 33.80, 90: 33.51, 80: 33.45, 70: 33.33, 60: 33.40, 50: 33.36, 40: 33.22},
    "ATC complete": {100: 33.80, 90: 33.67, 80: 33.71, 70: 33.70, 60: 33.74, 50: 33.56, 40: 33.65},
}
FID_TEXT = """\
Lower is closer to the reference; the columns are shares of tokens kept. FID is biased upwards at small n: compare it
only within one n, one kind of features and one reference. ± is half the 95 % bootstrap interval over the generated
pictures. A star marks a difference from the unmerged model whose 95 % interval, paired over the same draws, excludes
zero."""
PAPER_TEXT = """\
The paper's figures were taken with clean-fid. FIDs of different tools or features are not comparable; differences along
a row are."""
WAYS_TEXT = """\
Each picture is compared with the unmerged picture of the same seed: means over the pictures, ± half the 95 % bootstrap
interval. Pictures are compared as saved, in 8 bits, so PSNR cannot exceed 58.9 dB. A star marks the frontier: nothing
else tried is both as fast and closer. Seconds are medians per picture of batches drawn in turn with every
configuration, and the ratio is the median ratio to the unmerged model in the same round."""
NEARNESS = (45, 40, 35)  # dB
EQUAL_FIDELITY_TEXT = """\
The least time, as a ratio to the unmerged model's {seconds:.2f} s, at which each method stays within the column's PSNR,
and the setting that does it. Empty: no setting tried was close enough."""
RATIOS = (0.8, 0.65, 0.5)
EQUAL_SECONDS_TEXT = """\
The highest PSNR in dB that each method reaches within the column's share of the unmerged seconds, and the setting that
does it. Empty: no setting tried was fast enough."""
CHANGES_TEXT = """\
Change of PSNR in dB between two configurations that differ in one choice, paired picture by picture, ± half the 95 %
interval of the mean. A star marks intervals that exclude zero; each interval holds on its own, not all at once."""


def write_report(study: Study, folder: Path) -> None:
    """Write `results.json`, `results.csv`, and the report as HTML and Markdown to `folder`."""
    write_atomically(folder / "results.json", study.json.encode())
    write_atomically(folder / "results.csv", study.frame.to_csv(index=False).encode())
    make_page(study).write(folder)


def make_page(study: Study) -> Page:
    sections = [
        ways_section(study),
        equal_fidelity_section(study),
        equal_seconds_section(study),
        changes_section(study),
        fid_section(study),
        scores_section(study),
        *(pictures_section(study, picture) for picture in study.shown),
    ]
    title = "Token merging: fidelity to the unmerged model, time, and FID"
    return Page(title, study.conditions, study.commands, [section for section in sections if section is not None])


def ways_section(study: Study) -> Section | None:
    """Every configuration with its time and its nearness to the unmerged pictures."""
    if not study.others:
        return None
    frame = study.frame
    table = pd.DataFrame({"method": frame["method"], "setting": frame["setting"]})
    if study.is_timed:
        table["s/picture"], table["ratio"] = _written(frame, "seconds", 2), _written(frame, "ratio", 2)
    table["PSNR (dB)"] = _with_margin(frame, "psnr", 1) + _stars(study)
    table["SSIM"] = _with_margin(frame, "ssim", 3)
    if frame["lpips"].notna().any():
        table["LPIPS"] = _with_margin(frame, "lpips", 3)
    table["feature distance"] = _with_margin(frame, "feature_distance", 2)
    figure = (
        plot_fidelity(frame.assign(frontier=on_frontier(frame["ratio"], frame["psnr"]))[1:]) if study.is_timed else None
    )
    return Section("Fidelity and time", WAYS_TEXT, table=table, figure=figure)


def _stars(study: Study) -> pd.Series:
    if not study.is_timed:
        return pd.Series("", study.frame.index)
    return on_frontier(study.frame["seconds"], study.frame["psnr"]).map({True: " *", False: ""})


def equal_fidelity_section(study: Study) -> Section | None:
    """Speed at equal fidelity: the least time of each method within some PSNR."""
    if not study.is_timed or not study.others:
        return None
    columns = {f"{psnr} dB": study.frame[1:].query("psnr >= @psnr") for psnr in NEARNESS}
    best = {name: rows.loc[rows.groupby("method")["ratio"].idxmin()] for name, rows in columns.items()}
    text = f"{EQUAL_FIDELITY_TEXT.format(seconds=study.unmerged.seconds)} {_first(best, 'ratio', least=True)}"
    return Section("Speed at equal fidelity", text, table=_by_method(study, best, "ratio", 2))


def equal_seconds_section(study: Study) -> Section | None:
    """Fidelity at equal time: the best PSNR of each method within some share of the unmerged seconds."""
    if not study.is_timed or not study.others:
        return None
    columns = {f"{ratio:g} of the time": study.frame[1:].query("ratio <= @ratio") for ratio in RATIOS}
    best = {name: rows.loc[rows.groupby("method")["psnr"].idxmax()] for name, rows in columns.items()}
    text = f"{EQUAL_SECONDS_TEXT} {_first(best, 'psnr', least=False)}"
    return Section("Fidelity at equal time", text, table=_by_method(study, best, "psnr", 1))


def _first(columns: dict[str, pd.DataFrame], value: str, least: bool) -> str:
    """Who is first in each column: the method whose `value` is the least, or the greatest."""
    ordered = {name: rows.sort_values(value, ascending=least) for name, rows in columns.items() if len(rows)}
    first = [f"{rows['method'].iloc[0]} ({name})" for name, rows in ordered.items()]
    return f"First: {'; '.join(first) or 'none'}."


def _by_method(study: Study, columns: dict[str, pd.DataFrame], value: str, digits: int) -> pd.DataFrame:
    """A row for each method: in every column `value` and the setting of that column's row for the method."""
    table = pd.DataFrame(index=pd.Index(study.frame["method"][1:].unique(), name="method"))
    for name, rows in columns.items():
        table[name] = (_written(rows, value, digits) + " (" + rows["setting"] + ")").set_axis(rows["method"])
    return table.fillna("").reset_index()


def changes_section(study: Study) -> Section | None:
    """Paired changes of PSNR for all pairs of configurations that differ in one choice."""
    merged = [result for result in study.others if result.configuration.merge is not None]
    rows = [row for pair in combinations(merged, 2) if (row := _change(study, *pair))]
    return Section("One choice changed", CHANGES_TEXT, table=pd.DataFrame(rows)) if rows else None


def _change(study: Study, before: Result, after: Result) -> dict[str, str] | None:
    title = _one_choice(before.configuration, after.configuration)
    if title is None or before.configuration.setting != after.configuration.setting:
        return None
    gain = Estimate.of_mean(after.fidelity.psnr_of_each - before.fidelity.psnr_of_each, study.draws)
    change = f"{gain.value:+.1f} ± {gain.margin:.1f}{' *' if gain.differs else ''}"
    return {"change": title, "setting": after.configuration.setting, "PSNR (dB)": change}


def _one_choice(before: Configuration, after: Configuration) -> str | None:
    """What `after` has instead of `before`, in words, if just one choice that both have differs."""
    old, new = before.choices, after.choices
    differing = [field for field in old if field in new and old[field] != new[field]]
    if len(differing) != 1 or differing == ["rival"]:
        return None
    before_this = before.label if differing == ["method"] else describe(differing[0], old[differing[0]])
    return f"{after.label}, instead of {before_this}"


def fid_section(study: Study) -> Section | None:
    """FID by the share of tokens kept, as in the paper's Table 2."""
    merged = [each for each in study.others if each.configuration.keep is not None]
    if not merged:
        return None
    rows = [_fid_row(result) for result in [study.unmerged, *merged]]
    text = FID_TEXT
    if study.is_papers_model:
        rows += [
            {"method": f"{label}, in the paper", "keep": keep, "cell": f"{fid:.2f}"}
            for label, line in PAPER_TABLE_2.items()
            for keep, fid in line.items()
        ]
        text += " " + PAPER_TEXT
    cells = pd.DataFrame(rows).pivot_table("cell", "method", "keep", aggfunc="first", sort=False).fillna("")
    table = cells.sort_index(axis="columns", ascending=False).rename(columns="{:g} %".format).reset_index()
    figure = plot_fid(pd.DataFrame(rows[1 : len(merged) + 1]), study.unmerged.scores.fid.value)
    return Section(f"FID by {study.features}", text, table=table, figure=figure)


def _fid_row(result: Result) -> dict[str, object]:
    fid, fidelity = result.scores.fid, result.scores.fidelity
    star = " *" if fidelity is not None and fidelity.fid_change.differs else ""
    return {
        "method": result.configuration.label,
        "keep": 100.0 if result.configuration.is_unmerged else result.configuration.keep,
        "cell": f"{fid.value:.2f} ± {fid.margin:.2f}{star}",
        "fid": fid.value,
        "margin": fidelity.fid_change.margin if fidelity is not None else 0.0,
    }


def scores_section(study: Study) -> Section:
    """All distances to the reference pictures."""
    frame = study.frame
    table = pd.DataFrame(
        {
            "method": frame["method"],
            "setting": frame["setting"],
            "FID": _with_margin(frame, "fid", 2),
            "FID less unmerged": _with_margin(frame, "fid_change", 2) if "fid_change" in frame else "",
            "KID x 1000": (1000 * frame["kid"]).map("{:.2f}".format),
            "precision": _written(frame, "precision", 3),
            "recall": _written(frame, "recall", 3),
        }
    )
    if frame["peak_memory_bytes"].notna().any():
        table["peak GiB"] = (frame["peak_memory_bytes"] / 2**30).map("{:.2f}".format)
    return Section("Distance to the reference pictures", f"By {study.features}.", table=table)


def pictures_section(study: Study, picture: Picture) -> Section:
    """One picture as every configuration draws it."""
    index = study.unmerged.pictures.pictures.index(picture)
    shown = [Shown(_caption(result, index), result.pictures.load(picture)) for result in study.results]
    return Section(f'"{picture.prompt}", seed {picture.seed}', pictures=shown)


def _caption(result: Result, index: int) -> str:
    name = ", ".join(filter(None, [result.configuration.label, result.configuration.setting]))
    return name if result.scores.fidelity is None else f"{name}: {result.fidelity.psnr_of_each[index]:.1f} dB"


def _written(frame: pd.DataFrame, column: str, digits: int) -> pd.Series:
    texts = ["" if pd.isna(value) else f"{value:.{digits}f}" for value in frame[column]]
    return pd.Series(texts, frame.index, dtype=object)


def _with_margin(frame: pd.DataFrame, column: str, digits: int) -> pd.Series:
    texts = _written(frame, column, digits) + " ± " + _written(frame, f"{column}_margin", digits)
    return texts.where(frame[column].notna(), "")
