"""The commands beside the results can be run, and README gives the results as they are."""

import csv
import re
import subprocess
from pathlib import Path

import pytest

import classify
import fid
import speed
from atc_eval.command_line import parse

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "eval" / "results"
OPTIONS = {"eval/fid.py": fid.KINDS, "eval/speed.py": speed.KINDS, "eval/classify.py": classify.KINDS}
# Prints the arguments of each command instead of running it.
PRINT = 'python() { printf "%s\\x1f" "$@"; echo; }; accelerate() { shift; python "$@"; }\n'


def commands(file: Path) -> list[list[str]]:
    """The arguments of all commands in the code blocks of a page, which share their shell variables."""
    blocks = re.findall(r"```(?:bash)?\n(.*?)```", file.read_text(), re.DOTALL)
    script = PRINT + "\n".join(block for block in blocks if "eval/" in block)
    done = subprocess.run(["bash", "-eu", "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    return [line.split("\x1f")[:-1] for line in done.stdout.splitlines()]


README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {str(file.relative_to(RESULTS)): file for file in sorted(RESULTS.rglob("*.md"))}


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_run_as_they_stand(page: str) -> None:
    for command, *arguments in commands(PAGES[page]):
        demo = fid.DEMO if "--demo" in arguments and command == "eval/fid.py" else []
        parse(OPTIONS[command], None, arguments, demo)


FOLDERS = {
    "DDIM": "ddim",
    "Euler ancestral": "euler-ancestral",
    "DPM++ 2M Karras": "dpm-karras",
    "DPM++ 2M SDE Karras": "dpm-sde-karras",
    "four steps": "four-steps",
}


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.split("|")[1:-1]]


def measured(folder: str) -> set[tuple[str, str]]:
    """Times and PSNR as the tables of the page give them."""
    with (RESULTS / folder / "results.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["psnr"]]
    ratios = [f"{float(row['ratio']):.2f}" if row["ratio"] else "" for row in rows]
    fidelity = [f"{float(row['psnr']):.1f} ± {float(row['psnr_margin']):.1f}" for row in rows]
    return set(zip(ratios, fidelity, strict=True))


def test_the_tables_of_the_study_are_those_of_the_reports() -> None:
    page = PAGES["README.md"].read_text(encoding="utf-8")
    tables = re.findall(r"^(\|.*: time \|.*)\n\|[-|]+\n((?:\|.*\n)+)", page, re.MULTILINE)
    assert tables
    for header, body in tables:
        folders = [FOLDERS[name.removesuffix(": time")] for name in cells(header)[1::2]]
        for row in body.splitlines():
            _, *values = cells(row)
            for folder, time, psnr in zip(folders, values[::2], values[1::2], strict=True):
                assert not psnr or (time, psnr) in measured(folder), row


def test_the_table_of_choices_is_that_of_the_report() -> None:
    page = PAGES["README.md"].read_text(encoding="utf-8")
    (body,) = re.findall(r"^\| choice \|.*\n\|[-|]+\n((?:\|.*\n)+)", page, re.MULTILINE)
    values = {("", cells(row)[1]) for row in body.splitlines()}
    assert values == measured("ablations")


def test_the_results_in_the_readme_are_those_of_the_results_page() -> None:
    """Row by row, without the intervals."""
    (table,) = re.findall(r"<!-- results -->(.*)<!-- /results -->", README, re.DOTALL)
    rows = [line for line in table.splitlines() if line.startswith("| ")][1:]
    page = re.sub(r" ± [\d.]+", "", PAGES["README.md"].read_text(encoding="utf-8")).splitlines()
    assert rows
    assert [row for row in rows if row not in page] == []
