"""The report: results as JSON and CSV, tables in Markdown, plots and grids of pictures."""

import json
from collections.abc import Callable, Iterable, Sequence
from itertools import combinations
from pathlib import Path

from configurations import Configuration, describe
from pictures import Picture, write_atomically
from plots import picture_grid, plot_fid, plot_fidelity, save_figure
from results import Result, Study
from scores import Estimate

PAPER_TABLE_2 = {  # FID by percent kept (Haurum et al. 2024, Table 2)
    "ToMe": {100: 33.80, 90: 33.77, 80: 33.61, 70: 33.59, 60: 33.57, 50: 33.63, 40: 33.67},
    "ATC single": {100: 33.80, 90: 33.63, 80: 33.48, 70: 33.53, 60: 33.43, 50: 34.01, 40: 36.95},
    "ATC average": {100: 33.80, 90: 33.51, 80: 33.45, 70: 33.33, 60: 33.40, 50: 33.36, 40: 33.22},
    "ATC complete": {100: 33.80, 90: 33.67, 80: 33.71, 70: 33.70, 60: 33.74, 50: 33.56, 40: 33.65},
}
FID_TEXT = """\
Lower is nearer to the reference; columns are shares of tokens kept. FID is biased upwards at small n: compare it only
within one n, one kind of features and one reference. ± is half the 95 % interval by bootstrap over the generated
pictures. A star marks a difference from the unmerged model whose 95 % interval, paired over the same draws, excludes
zero; without it, none is claimed."""
FIDELITY_TEXT = """\
Means over the pictures, ± half the 95 % interval by bootstrap. Columns are shares of tokens kept. High PSNR and SSIM
and a small distance of the features are near. Pictures are compared as saved, in 8 bits: PSNR cannot exceed 58.9 dB."""
NEARNESS = (45, 40, 35)  # dB
EQUAL_FIDELITY_TEXT = """\
The fastest that each way of merging gets while its mean PSNR stays at or above the column's, of the shares of tokens
that were tried: seconds per picture, and that share. The unmerged model takes {unmerged:.2f} s."""
CHANGES_TEXT = """\
Change of PSNR in dB between two configurations that differ in one choice, paired picture by picture, ± half the 95 %
interval of its mean; **bold** where that excludes zero. Each interval holds on its own, not all of them at once."""
PAPER_TEXT = """\
The paper's figures were taken with clean-fid; those of different tools or features are not comparable, only the
differences along a row are."""

Cell = Callable[[Result], str]


def write_report(study: Study, folder: Path) -> None:
    """Write `results.json`, `results.csv`, `report.md` and its pictures to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "results.json", json.dumps(study.json, indent=2).encode())
    write_atomically(folder / "results.csv", study.csv.encode())
    save_figure(plot_fid(study), folder / "fid.png")
    if study.is_timed:
        save_figure(plot_fidelity(study), folder / "fidelity.png")
    for picture in study.shown:
        save_figure(picture_grid(study, picture), folder / _grid_file(picture))
    write_atomically(folder / "report.md", markdown(study).encode())


def markdown(study: Study) -> str:
    """The report as Markdown, which shows the plots and grids that lie beside it."""
    sections = [
        "# Token merging: the distance to real pictures, and to the unmerged model's",
        "\n".join(f"- {name}: {value}" for name, value in study.conditions.items()),
        "\n".join(["```", *study.commands, "```"]),
        *_fid_section(study),
        *_fidelity_section(study),
        *_equal_fidelity_section(study),
        *_changes_section(study),
        "## Time, and the other scores",
        f"FID, KID, precision and recall by {study.features}.",
        _details(study),
        *(_shown(picture) for picture in study.shown),
    ]
    return "\n\n".join(sections) + "\n"


def _fid_section(study: Study) -> list[str]:
    rows = _rows(study, study.keeps, _fid)
    text = [FID_TEXT]
    if study.is_papers_model:
        rows += [[f"{label}, the paper", *_paper_row(study, label)] for label in PAPER_TABLE_2]
        text.append(PAPER_TEXT)
    table = _by_keep(f"FID by {study.features}", study.keeps, rows)
    return ["## FID", *text, table, "![FID by the share of tokens kept](fid.png)"]


def _paper_row(study: Study, label: str) -> list[str]:
    return [f"{PAPER_TABLE_2[label][int(keep)]:.2f}" if keep in PAPER_TABLE_2[label] else "" for keep in study.keeps]


def _fidelity_section(study: Study) -> list[str]:
    if not study.merged:
        return []
    cells: dict[str, Cell] = {
        "PSNR in dB": lambda result: _written(result.fidelity.psnr, 1),
        "SSIM": lambda result: _written(result.fidelity.ssim, 3),
        f"distance by {study.features}": lambda result: _written(result.fidelity.feature_distance, 2),
    }
    keeps = study.keeps[1:]
    tables = [_by_keep(title, keeps, _rows(study, keeps, cell)) for title, cell in cells.items()]
    figure = ["![PSNR by seconds per picture](fidelity.png)"] if study.is_timed else []
    return ["## Nearness to the unmerged picture of the same seed", FIDELITY_TEXT, *tables, *figure]


def _equal_fidelity_section(study: Study) -> list[str]:
    unmerged = study.unmerged.record["seconds_per_picture"]
    if not study.is_timed or unmerged is None:
        return []
    rows = [[label, *(_fastest(line.values(), psnr) for psnr in NEARNESS)] for label, line in study.lines.items()]
    table = _table(["seconds per picture", *(f"{psnr} dB" for psnr in NEARNESS)], rows)
    return ["## Speed at equal fidelity", EQUAL_FIDELITY_TEXT.format(unmerged=unmerged), table]


def _fastest(line: Iterable[Result], psnr: float) -> str:
    """The least seconds per picture at which the merged results of `line` stay within `psnr`, and the share kept."""
    merged = [result for result in line if result.scores.fidelity and result.record["seconds_per_picture"]]
    near = [result for result in merged if result.fidelity.psnr.value >= psnr]
    if not near:
        return ""
    fastest = min(near, key=lambda result: result.record["seconds_per_picture"])
    return f"{fastest.record['seconds_per_picture']:.2f} at {fastest.keep:g} %"


def _changes_section(study: Study) -> list[str]:
    keeps, changes = study.keeps[1:], changes_of_one_choice(study)
    if not changes:
        return []
    rows = [[title, *(cells.get(keep, "") for keep in keeps)] for title, cells in changes.items()]
    return ["## One choice changed, everything else equal", CHANGES_TEXT, _by_keep("change of PSNR in dB", keeps, rows)]


def changes_of_one_choice(study: Study) -> dict[str, dict[float, str]]:
    """Paired changes of PSNR, by title and by share kept, for all pairs that differ in one choice."""
    changes: dict[str, dict[float, str]] = {}
    for before, after in combinations(study.merged, 2):
        if before.keep == after.keep and (title := _one_choice(before.configuration, after.configuration)):
            gain = Estimate.of_mean(after.fidelity.psnr_of_each - before.fidelity.psnr_of_each, study.draws)
            text = f"{gain.value:+.1f} ± {gain.margin:.1f}"
            changes.setdefault(title, {})[before.keep] = f"**{text}**" if gain.differs else text
    return changes


def _one_choice(before: Configuration, after: Configuration) -> str | None:
    """What `after` has instead of `before`, in words, if that is one choice of those that both have."""
    old, new = before.choices, after.choices
    differing = [field for field in old if field in new and old[field] != new[field]]
    if len(differing) != 1:
        return None
    field = differing[0]
    if field == "method":
        rest = after.label.removeprefix(new["method"])
        return f"{new['method']} instead of {old['method']}{rest}"
    return f"{after.label}, instead of {describe(field, old[field])}"


def _details(study: Study) -> str:
    header = ["", "kept", "FID less unmerged", "KID x 1000", "precision", "recall", "s/picture", "peak GiB"]
    return _table(header, [_detail(result) for result in study.results])


def _detail(result: Result) -> list[str]:
    scores, seconds, memory = result.scores, result.record["seconds_per_picture"], result.record["peak_memory_bytes"]
    return [
        result.label,
        f"{result.keep:g} %",
        "" if scores.fidelity is None else _written(scores.fidelity.fid_change, 2),
        f"{1000 * scores.kid:.2f} (sd {1000 * scores.kid_deviation:.2f})",
        f"{scores.precision:.3f}",
        f"{scores.recall:.3f}",
        "" if seconds is None else f"{seconds:.3g}",
        "" if memory is None else f"{memory / 2**30:.2f}",
    ]


def _shown(picture: Picture) -> str:
    return f'## "{picture.prompt}", seed {picture.seed}\n\n![{picture.prompt}, merged]({_grid_file(picture)})'


def _grid_file(picture: Picture) -> str:
    return f"grid_{picture.file}"


def _fid(result: Result) -> str:
    fidelity = result.scores.fidelity
    return _written(result.scores.fid, 2) + ("*" if fidelity is not None and fidelity.fid_change.differs else "")


def _written(estimate: Estimate, digits: int) -> str:
    return f"{estimate.value:.{digits}f} ± {estimate.margin:.{digits}f}"


def _rows(study: Study, keeps: Sequence[float], cell: Cell) -> list[list[str]]:
    """A row of cells for every way of merging."""
    return [
        [label, *(cell(line[keep]) if keep in line else "" for keep in keeps)] for label, line in study.lines.items()
    ]


def _by_keep(title: str, keeps: Sequence[float], rows: Sequence[Sequence[str]]) -> str:
    return _table([title, *(f"{keep:g} %" for keep in keeps)], rows)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
