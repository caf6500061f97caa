"""The report of a study: results as JSON and CSV, and a page of tables, plots and images."""

from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

import pandas as pd

from atc_diffusion.commands import write_atomically
from atc_eval.draw.images import PlannedImage
from atc_eval.report.page import Page, Section, Shown
from atc_eval.report.plots import on_frontier, plot_fidelity, plot_lines
from atc_eval.report.results import Study
from atc_eval.score.statistics import Estimate

PAPER_TABLE_2 = Path(__file__).with_name("paper_table_2.csv")  # FID by percent kept (Haurum et al. 2024, Table 2)
FID_TEXT = """\
Lower is closer to the reference; the columns are fractions of tokens kept. FID is biased upwards at small n: compare it
only within one n, one kind of features and one reference. ± is half the 95 % bootstrap interval over the images drawn.
A star marks a difference from the unmerged model whose 95 % interval, paired over the same draws, excludes zero."""
PAPER_TEXT = """\
The paper's figures were taken with clean-fid. FIDs of different tools or features are not comparable; differences along
a row are."""
METHODS_TEXT = """\
Each image is compared with the unmerged image of the same seed: means over the images, ± half the 95 % bootstrap
interval. An equal image counts as 58.9 dB, the PSNR of rounding to 8 bits. * on the Pareto front: no other row is as
fast and closer. Batches are drawn with each method in turn; seconds are medians per image, and ratio is the median of
the ratios to the unmerged model in the same round."""
THRESHOLDS = (45, 40, 35)  # dB
EQUAL_FIDELITY_TEXT = """\
The least time at which each method reaches the column's PSNR, as a fraction of the unmerged model's {seconds:.2f} s,
and the setting that reaches it. Empty: no setting tried was close enough."""
RATIOS = (0.8, 0.65, 0.5)
EQUAL_SECONDS_TEXT = """\
The highest PSNR in dB that each method reaches within the column's fraction of the unmerged seconds, and the setting
that reaches it. Empty: no setting tried was fast enough."""
CHANGES_TEXT = """\
Change of PSNR in dB between two methods that differ in one choice, paired image by image, ± half the 95 % interval of
the mean. A star marks intervals that exclude zero; each interval holds on its own, not all at once."""


def write_report(study: Study, folder: Path) -> None:
    """Write `results.json`, `results.csv`, and the report as HTML and Markdown to `folder`."""
    write_atomically(folder / "results.json", study.json.encode())
    write_atomically(folder / "results.csv", study.frame.to_csv(index=False).encode())
    make_page(study).write(folder)


def make_page(study: Study) -> Page:
    sections = [
        *methods_section(study),
        *best_sections(study),
        *changes_section(study),
        *fid_section(study),
        scores_section(study),
        *(images_section(study, image) for image in study.shown),
    ]
    title = "Token merging: fidelity to the unmerged model, time, and FID"
    return Page(title, study.conditions, study.commands, sections)


def methods_section(study: Study) -> Iterator[Section]:
    """Every method with its time and its fidelity to the unmerged images."""
    if not study.others:
        return
    frame, figure = study.frame, None
    table, stars = frame[["method", "setting"]].copy(), pd.Series("", frame.index)
    if study.is_timed:
        frontier = on_frontier(frame["ratio"], frame["psnr"])
        table["s/image"], table["ratio"] = frame["seconds"].map("{:.2f}".format), frame["ratio"].map("{:.2f}".format)
        stars, figure = frontier.map({True: " *", False: ""}), plot_fidelity(frame.assign(frontier=frontier)[1:])
    table["PSNR (dB)"] = _fidelities(study, "psnr", 1) + stars
    table["SSIM"] = _fidelities(study, "ssim", 3)
    if study.others[0].fidelity.lpips:
        table["LPIPS"] = _fidelities(study, "lpips", 3)
    table["feature distance"] = _fidelities(study, "feature_distance", 2)
    yield Section("Fidelity and time", METHODS_TEXT, table=table, figure=figure)


def _fidelities(study: Study, figure: str, digits: int) -> pd.Series:
    """A figure of every set, as text; empty for the unmerged set."""
    cells = [f"{getattr(each.fidelity, figure):.{digits}f}" for each in study.others]
    return pd.Series(["", *cells], study.frame.index)


def best_sections(study: Study) -> Iterator[Section]:
    """The best setting of each method: the fastest that is close enough, and the closest that is fast enough."""
    if not study.is_timed or not study.others:
        return
    rows = study.frame[1:]
    near = {f"{psnr} dB": rows[rows["psnr"] >= psnr] for psnr in THRESHOLDS}
    fast = {f"{ratio:g} of the time": rows[rows["ratio"] <= ratio] for ratio in RATIOS}
    text = EQUAL_FIDELITY_TEXT.format(seconds=study.unmerged.seconds)
    methods = pd.Index(rows["method"].unique(), name="method")
    yield _best_section("Speed at equal fidelity", text, methods, near, ("ratio", 2), least=True)
    yield _best_section("Fidelity at equal time", EQUAL_SECONDS_TEXT, methods, fast, ("psnr", 1), least=False)


def _best_section(
    title: str, text: str, methods: pd.Index, columns: dict[str, pd.DataFrame], value: tuple[str, int], least: bool
) -> Section:
    """A row per method; in each column the best value among its rows, and the setting that reaches it."""
    table, first = pd.DataFrame(index=methods), []
    for name, rows in columns.items():
        best = rows.sort_values(value[0], ascending=least, kind="stable").drop_duplicates("method")
        cells = {row["method"]: f"{row[value[0]]:.{value[1]}f} ({row['setting']})" for _, row in best.iterrows()}
        first += [f"{method} ({name})" for method in list(cells)[:1]]
        table[name] = pd.Series(cells, dtype=object)
    return Section(title, f"{text} First: {'; '.join(first) or 'none'}.", table=table.fillna("").reset_index())


def changes_section(study: Study) -> Iterator[Section]:
    """Paired changes of PSNR between methods that differ in one choice."""
    rows = []
    for before, after in combinations([result for result in study.others if result.method.config], 2):
        instead, setting = after.method.instead(before.method), after.method.setting
        if instead and before.method.setting == setting:
            gain = Estimate.of_mean(after.fidelity.psnr_of_each - before.fidelity.psnr_of_each, study.draws)
            change = f"{after.method.label}, instead of {instead}"
            rows.append({"change": change, "setting": setting, "PSNR (dB)": f"{gain:+.1f}{gain.star}"})
    if rows:
        yield Section("One choice changed", CHANGES_TEXT, table=pd.DataFrame(rows))


def fid_section(study: Study) -> Iterator[Section]:
    """FID by the fraction of tokens kept, as in the paper's Table 2."""
    keep = pd.Series([100.0, *(each.method.keep for each in study.others)], dtype=float)
    if keep[1:].isna().all():
        return
    stars = ["", *(each.fidelity.fid_change.star for each in study.others)]
    cells = [f"{each.scores.fid:.2f}{star}" for each, star in zip(study.results, stars, strict=True)]
    rows = study.frame.assign(keep=keep, cell=cells).dropna(subset="keep")
    points = rows[1:].rename(columns={"keep": "x", "fid": "y", "fid_change_margin": "margin"})
    figure = plot_lines(points, "tokens kept (%)", "FID", study.unmerged.scores.fid.value)
    if study.is_papers_model:
        paper = pd.read_csv(PAPER_TABLE_2, index_col="keep").map("{:.2f}".format)
        paper = paper.add_suffix(", in the paper").reset_index().melt("keep", var_name="method", value_name="cell")
        rows = pd.concat([rows, paper])
    table = rows.pivot_table("cell", "method", "keep", aggfunc="first", sort=False).fillna("")
    table = table.sort_index(axis="columns", ascending=False).rename(columns="{:g} %".format).reset_index()
    text = f"{FID_TEXT} {PAPER_TEXT}" if study.is_papers_model else FID_TEXT
    yield Section(f"FID by {study.features}", text, table=table, figure=figure)


def scores_section(study: Study) -> Section:
    """All distances to the reference images."""
    frame = study.frame
    table = frame[["method", "setting"]].copy()
    table["FID"] = [f"{each.scores.fid:.2f}" for each in study.results]
    table["FID less unmerged"] = _fidelities(study, "fid_change", 2)
    table["KID x 1000"] = (1000 * frame["kid"]).map("{:.2f}".format)
    for column in ("precision", "recall"):
        table[column] = frame[column].map("{:.3f}".format)
    if frame["peak_memory_bytes"].notna().any():
        table["peak GiB"] = (frame["peak_memory_bytes"] / 2**30).map("{:.2f}".format)
    return Section("Distance to the reference images", f"By {study.features}.", table=table)


def images_section(study: Study, image: PlannedImage) -> Section:
    """One image as every method draws it."""
    index, best = study.unmerged.images.images.index(image), [True] * len(study.results)
    if study.is_timed:
        best = list(on_frontier(study.frame["ratio"], study.frame["psnr"]))
    shown = []
    for result, is_best in zip(study.results, best, strict=True):
        name, fidelity = str(result.method), result.scores.fidelity
        caption = f"{name}: {fidelity.psnr_of_each[index]:.1f} dB" if fidelity else name
        shown.append(Shown(caption, result.images.load(image), is_best))
    return Section(f'"{image.prompt}", seed {image.seed}', images=shown)
