"""What the tables say, and what they do not."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from configurations import Configuration, grid
from matplotlib.axes import Axes
from pictures import PictureSet, plan
from PIL import Image
from plots import picture_grid
from report import changes_of_one_choice, markdown, write_report
from results import Result, Study
from scores import Estimate, Fidelity, Scores, bootstrap_draws

PICTURES = plan(["ant", "bee"], [0, 1], 2, "{}", 0)
RECORD: dict[str, Any] = {
    "seconds_per_picture": 1.5,
    "peak_memory_bytes": None,
    "devices": ["cpu"],
    "versions": {},
    "summary": "",
}
PSNR = {"ToMe": 30.0, "ATC average": 31.0, "ATC average, proportional attention": 40.0}


def make_result(configuration: Configuration, fid_margin: float = 0.5) -> Result:
    noise = np.array([-0.2, 0.1, 0.1, 0.0])
    fidelity = None
    if configuration.merge is not None:
        fidelity = Fidelity(
            fid_change=Estimate(1.0, fid_margin),
            psnr=Estimate(PSNR[configuration.label], 0.1),
            ssim=Estimate(0.9, 0.01),
            feature_distance=Estimate(2.0, 0.1),
            psnr_of_each=PSNR[configuration.label] + noise,
        )
    scores = Scores(4, Estimate(33.8, 1.0), 0.001, 0.0005, 0.5, 0.4, fidelity)
    return Result(configuration, PictureSet(Path(), PICTURES, {}), scores, RECORD)


@pytest.fixture
def study() -> Study:
    configurations = [
        *grid(["tome"], [50, 40], {}),
        *grid(["atc"], [50], {"proportional_attention": [False, True]})[1:],
    ]
    results = [make_result(configuration) for configuration in configurations]
    return Study(
        results,
        features="some network",
        conditions={"model": "tiny"},
        commands=["python eval/fid.py"],
        draws=bootstrap_draws(4, 50),
        shown=[],
        is_papers_model=False,
    )


def rows(text: str) -> dict[str, list[str]]:
    """Cells of the first table in `text` by the first cell of their row."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return {cells[0]: cells[1:] for line in lines if (cells := [cell.strip() for cell in line.split("|")[1:-1]])}


def section(text: str, title: str) -> str:
    return text.split(f"## {title}\n")[1].split("\n## ")[0]


def test_the_table_has_a_row_for_each_way_and_a_column_for_each_share(study: Study) -> None:
    table = rows(section(markdown(study), "FID"))
    assert table["FID by some network"] == ["100 %", "50 %", "40 %"]
    assert table["ToMe"] == ["33.80 ± 1.00", "33.80 ± 1.00*", "33.80 ± 1.00*"]
    assert table["ATC average"] == ["33.80 ± 1.00", "33.80 ± 1.00*", ""]


def test_speed_at_equal_fidelity_is_that_of_the_fastest_share_that_is_near_enough(study: Study) -> None:
    quicker = [replace(each, record=RECORD | {"seconds_per_picture": each.keep / 100}) for each in study.results]
    text = section(markdown(replace(study, results=quicker)), "Speed at equal fidelity")
    assert "The unmerged model takes 1.00 s." in text
    assert rows(text)["seconds per picture"] == ["45 dB", "40 dB", "35 dB"]
    assert rows(text)["ToMe"] == ["", "", ""]
    assert rows(text)["ATC average, proportional attention"] == ["", "0.50 at 50 %", "0.50 at 50 %"]


def test_sets_without_times_are_not_set_against_time(study: Study, tmp_path: Path) -> None:
    untimed = [replace(each, record=RECORD | {"seconds_per_picture": None}) for each in study.results]
    write_report(replace(study, results=untimed, shown=[]), tmp_path)
    assert "fidelity.png" not in (tmp_path / "report.md").read_text()
    assert not (tmp_path / "fidelity.png").exists()


def test_a_difference_within_its_interval_has_no_star(study: Study) -> None:
    unresolved = replace(study, results=[study.unmerged, make_result(study.merged[0].configuration, fid_margin=1.5)])
    assert rows(section(markdown(unresolved), "FID"))["ToMe"] == ["33.80 ± 1.00", "33.80 ± 1.00"]


def test_the_papers_figures_stand_beside_those_of_its_model_alone(study: Study) -> None:
    assert "the paper" not in section(markdown(study), "FID")
    table = rows(section(markdown(replace(study, is_papers_model=True)), "FID"))
    assert table["ATC average, the paper"] == ["33.80", "33.36", "33.22"]
    assert table["ATC single, the paper"] == ["33.80", "34.01", "36.95"]


def test_pairs_that_differ_in_one_choice_are_compared_picture_by_picture(study: Study) -> None:
    # Every picture gains the same, so the interval has no width though the pictures vary.
    assert changes_of_one_choice(study) == {
        "ATC average instead of ToMe": {50: "**+1.0 ± 0.0**"},
        "ATC average, proportional attention, instead of no proportional attention": {50: "**+9.0 ± 0.0**"},
    }


def test_the_unmerged_model_alone_makes_a_report(study: Study) -> None:
    text = markdown(replace(study, results=study.results[:1]))
    assert rows(section(text, "FID"))["unmerged"] == ["33.80 ± 1.00"]
    assert "Nearness" not in text


def test_a_grid_shows_the_pictures_of_each_set(study: Study, tmp_path: Path) -> None:
    results = []
    for number, result in enumerate(study.results):
        pictures = PictureSet(tmp_path / str(number), PICTURES, {})
        pictures.save(PICTURES[2], Image.new("RGB", (4, 4), (50 * number, 0, 0)))
        results.append(replace(result, pictures=pictures))
    figure = picture_grid(replace(study, results=results), PICTURES[2])
    shown = [[reds(axes) for axes in figure.axes[start : start + 3]] for start in (0, 3, 6)]
    assert shown == [[[0], [50], [100]], [[0], [150], []], [[0], [200], []]]


def reds(axes: Axes) -> list[int]:
    return [int(np.asarray(image.get_array())[0, 0, 0]) for image in axes.images]
