"""The tables, plots and images of a report."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from PIL import Image

from atc_diffusion import ATCConfig
from atc_eval.draw.images import plan
from atc_eval.draw.sets import ImageSet
from atc_eval.grid import grid
from atc_eval.method import Method
from atc_eval.report.plots import LINE_HEIGHT, on_frontier, spread
from atc_eval.report.results import Result, Study
from atc_eval.report.sections import make_page, write_report
from atc_eval.rivals import Rival
from atc_eval.score.scorer import Fidelity, Scores
from atc_eval.score.statistics import Estimate, bootstrap_draws

IMAGES = plan(["ant", "bee"], [0, 1], 2, "{}", 0)
RECORD: dict[str, Any] = {"peak_memory_bytes": None, "devices": ["cpu"], "versions": {}}
ATC = "ATCConfig.paper(proportional_attention=True)"
PSNR = {"ToMeConfig()": 30.0, "ATCConfig.paper()": 31.0, ATC: 40.0}


def make_result(method: Method, psnr: float, ratio: float, fid_margin: float = 0.5) -> Result:
    noise = np.array([-0.2, 0.1, 0.1, 0.0])
    fidelity = Fidelity(
        fid_change=Estimate(1.0, fid_margin),
        psnr=Estimate(psnr, 0.1),
        ssim=Estimate(0.9, 0.01),
        lpips=None,
        feature_distance=Estimate(2.0, 0.1),
        psnr_of_each=psnr + noise,
    )
    scores = Scores(4, Estimate(33.8, 1.0), 0.001, 0.0005, 0.5, 0.4, None if method.is_unmerged else fidelity)
    return Result(method, ImageSet(Path(), IMAGES, {}), scores, RECORD, {"seconds": 2 * ratio, "ratio": ratio})


@pytest.fixture
def study() -> Study:
    tome = grid(["tome"], [(0.5, None), (0.4, None)], {})
    atc = grid(["paper"], [(0.5, None)], {"proportional_attention": [False, True]})[1:]
    results = [make_result(each, PSNR.get(each.label, 0.0), (each.keep or 100) / 100) for each in [*tome, *atc]]
    results.append(make_result(Method(rival=Rival("steps", 0.7)), 42.0, 0.7))
    return Study(
        results,
        features="some network",
        conditions={"model": "tiny"},
        commands=["python eval/fid.py"],
        draws=bootstrap_draws(4, 50),
        shown=[],
        is_papers_model=False,
    )


def table(study: Study, title: str) -> pd.DataFrame:
    [section] = [section for section in make_page(study).sections if section.title == title]
    assert section.table is not None
    return section.table


def figure(study: Study, title: str) -> Figure:
    [section] = [section for section in make_page(study).sections if section.title == title]
    assert section.figure is not None
    return section.figure


def cells(table: pd.DataFrame, method: str) -> list[str]:
    """The row of `method`, without it."""
    [row] = table[table["method"] == method].to_numpy().tolist()
    return row[1:]


def test_every_way_has_its_time_and_the_frontier_a_star(study: Study) -> None:
    rows = table(study, "Fidelity and time")
    assert rows["s/image"].tolist() == ["2.00", "1.00", "0.80", "1.00", "1.00", "1.40"]
    assert rows["ratio"].tolist() == ["1.00", "0.50", "0.40", "0.50", "0.50", "0.70"]
    stars = ["", "30.0 ± 0.1", "30.0 ± 0.1 *", "31.0 ± 0.1", "40.0 ± 0.1 *", "42.0 ± 0.1 *"]
    assert rows["PSNR (dB)"].tolist() == stars
    assert "LPIPS" not in rows


def test_nothing_slower_than_the_unmerged_model_is_on_the_frontier() -> None:
    marked = on_frontier(pd.Series([1.0, 1.2, 0.5, 0.5]), pd.Series([float("nan"), 50.0, 40.0, 40.0]))
    assert marked.tolist() == [False, False, True, False]


def test_speed_at_equal_fidelity_is_that_of_the_fastest_setting_that_is_near_enough(study: Study) -> None:
    speed = table(study, "Speed at equal fidelity")
    assert speed.columns.tolist() == ["method", "45 dB", "40 dB", "35 dB"]
    assert cells(speed, "ToMeConfig()") == ["", "", ""]
    assert cells(speed, ATC) == ["", "0.50 (50 %)", "0.50 (50 %)"]
    assert cells(speed, "fewer steps") == ["", "0.70 (0.7 of the steps)", "0.70 (0.7 of the steps)"]


def test_fidelity_at_equal_time_is_that_of_the_nearest_setting_that_is_fast_enough(study: Study) -> None:
    fidelity = table(study, "Fidelity at equal time")
    assert fidelity.columns.tolist() == ["method", "0.8 of the time", "0.65 of the time", "0.5 of the time"]
    assert cells(fidelity, "fewer steps") == ["42.0 (0.7 of the steps)", "", ""]
    assert cells(fidelity, ATC) == ["40.0 (50 %)"] * 3


def test_the_text_says_which_method_is_first(study: Study) -> None:
    texts = {section.title: section.text for section in make_page(study).sections}
    assert texts["Speed at equal fidelity"].endswith(f"First: {ATC} (40 dB); {ATC} (35 dB).")
    assert texts["Fidelity at equal time"].endswith(
        f"First: fewer steps (0.8 of the time); {ATC} (0.65 of the time); {ATC} (0.5 of the time)."
    )


def test_sets_without_times_are_not_set_against_time(study: Study, tmp_path: Path) -> None:
    untimed = replace(study, results=[replace(each, timing={}) for each in study.results])
    write_report(untimed, tmp_path)
    titles = {section.title for section in make_page(untimed).sections}
    assert not titles & {"Speed at equal fidelity", "Fidelity at equal time"}
    assert not (tmp_path / "fidelity-and-time.svg").exists()
    assert "ratio" not in table(untimed, "Fidelity and time")


def test_fid_has_a_row_for_each_way_and_a_column_for_each_share(study: Study) -> None:
    fid = table(study, "FID by some network")
    assert fid.columns.tolist() == ["method", "100 %", "50 %", "40 %"]
    assert cells(fid, "unmerged") == ["33.80 ± 1.00", "", ""]
    assert cells(fid, "ToMeConfig()") == ["", "33.80 ± 1.00 *", "33.80 ± 1.00 *"]
    assert "fewer steps" not in fid["method"].tolist()


def test_a_difference_within_its_interval_has_no_star(study: Study) -> None:
    unresolved = make_result(study.others[0].method, 30.0, 0.5, fid_margin=1.5)
    fid = table(replace(study, results=[study.unmerged, unresolved]), "FID by some network")
    assert cells(fid, "ToMeConfig()") == ["", "33.80 ± 1.00"]


def test_the_papers_figures_stand_beside_those_of_its_model_alone(study: Study) -> None:
    assert not any("in the paper" in method for method in table(study, "FID by some network")["method"])
    fid = table(replace(study, is_papers_model=True), "FID by some network")
    assert fid.columns.tolist()[1:] == [f"{keep} %" for keep in (100, 90, 80, 70, 60, 50, 40)]
    assert cells(fid, "ATC single, in the paper") == ["33.80", "33.63", "33.48", "33.53", "33.43", "34.01", "36.95"]


def test_pairs_that_differ_in_one_choice_are_compared_image_by_image(study: Study) -> None:
    # Every image gains the same, so the interval has no width though the images vary.
    assert table(study, "One choice changed").to_numpy().tolist() == [
        ["ATCConfig.paper(), instead of ToMeConfig()", "50 %", "+1.0 ± 0.0 *"],
        [f"{ATC}, instead of proportional_attention=False", "50 %", "+9.0 ± 0.0 *"],
    ]


def test_the_unmerged_model_alone_makes_a_report(study: Study) -> None:
    sections = make_page(replace(study, results=study.results[:1])).sections
    assert [section.title for section in sections] == ["Distance to the reference images"]


def test_images_are_shown_as_each_way_draws_them(study: Study, tmp_path: Path) -> None:
    results = []
    for number, result in enumerate(study.results):
        images = ImageSet(tmp_path / str(number), IMAGES, {})
        images.save(IMAGES[2], Image.new("RGB", (4, 4), (50 * number, 0, 0)))
        results.append(replace(result, images=images))
    [section] = [each for each in make_page(replace(study, results=results, shown=[IMAGES[2]])).sections if each.images]
    assert [shown.image.getpixel((0, 0)) for shown in section.images] == [(50 * number, 0, 0) for number in range(6)]
    assert section.images[0].caption == "unmerged"
    assert section.images[4].caption == f"{ATC}, 50 %: 40.1 dB"


def test_lpips_has_a_column_where_it_was_measured(study: Study) -> None:
    result = make_result(Method(ATCConfig(r=0.5)), 40.0, 0.5)
    fidelity = replace(result.fidelity, lpips=Estimate(0.123, 0.01))
    measured = replace(result, scores=replace(result.scores, fidelity=fidelity))
    rows = table(replace(study, results=[study.unmerged, measured]), "Fidelity and time")
    assert rows["LPIPS"].tolist() == ["", "0.123 ± 0.010"]


def test_lines_need_two_points_and_a_plot_something_to_compare(study: Study) -> None:
    assert len(figure(study, "FID by some network").axes[0].lines) > 0
    once = replace(study, results=[study.unmerged, study.others[0]])
    assert [section.title for section in make_page(once).sections if section.figure] == []


def test_labels_that_would_overlap_are_a_line_apart() -> None:
    above, below, apart, beside = spread([(0.0, 50.0, 30.0), (20.0, 49.0, 30.0), (0.0, 10.0, 30.0), (80.0, 50.0, 30.0)])
    assert (above, apart, beside) == (50, 10, 50)
    assert below == 50 - LINE_HEIGHT
