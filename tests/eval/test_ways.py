"""From the command line to configurations and their names."""

import re
from collections.abc import Callable
from typing import Any

import pytest

from arguments import options
from atc_diffusion import ATCConfig, ToMeConfig
from draw.configuration import Configuration
from draw.grid import Ways, parse_option
from draw.rivals import Rival


def parse(line: str) -> list[Configuration]:
    return options.parse(Ways, None, line.split()).configurations()


def test_values_have_their_own_type() -> None:
    texts = ["features=keys,values", "proportional_attention=on,false", "window_size=null,8", "linkage=ward"]
    assert [parse_option(text) for text in texts] == [
        ("features", ("keys", "values")),
        ("proportional_attention", (True, False)),
        ("window_size", (None, 8)),
        ("linkage", ("ward",)),
    ]


@pytest.mark.parametrize("text", ["colour=red", "linkage", "linkage=", "r=0.5", "r_keys=0.1", "levels={1: 2}"])
def test_an_option_of_another_form_is_one_sentence(text: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        parse_option(text)


def test_the_default_is_the_papers_setting_after_the_unmerged_model() -> None:
    assert parse("--keep 40 100") == [Configuration(), Configuration(ATCConfig.paper(0.4))]


def test_several_values_give_every_combination_and_tome_takes_what_it_has() -> None:
    ways = parse("--method atc tome none --keep 50 --set linkage=average,single recluster_threshold=0.1,0.2")
    assert [each.label for each in ways] == [
        "unmerged",
        "ATC average, recluster threshold 0.1",
        "ATC average, recluster threshold 0.2",
        "ATC single, recluster threshold 0.1",
        "ATC single, recluster threshold 0.2",
        "ToMe, recluster threshold 0.1",
        "ToMe, recluster threshold 0.2",
    ]


def test_queries_and_keys_have_shares_of_their_own() -> None:
    ways = parse("--method atc tome --keep 100/10 50/10 100/25 50/25 50/100")
    assert [(each.label, each.setting) for each in ways[1:]] == [
        ("ATC average", "keys 10 %"),
        ("ATC average", "50 %, keys 10 %"),
        ("ATC average", "keys 25 %"),
        ("ATC average", "50 %, keys 25 %"),
        ("ATC average", "50 %, keys 100 %"),
        ("ToMe", "keys 25 %"),
        ("ToMe", "50 %, keys 25 %"),
        ("ToMe", "50 %, keys 100 %"),
    ]


def test_rivals_stand_alone_and_together_with_every_merging() -> None:
    ways = parse("--method atc --keep 50 25 --rival steps:0.7 todo:2 --with deepcache:3")
    assert [(each.label, each.setting) for each in ways[3:]] == [
        ("fewer steps", "0.7 of the steps"),
        ("ToDo", "keys 25 %"),
        ("ATC average + DeepCache", "50 %, every 3 steps"),
        ("ATC average + DeepCache", "25 %, every 3 steps"),
    ]


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("--rival todo:1", "argument --rival: todo takes a whole number from 2 to 64, got 1"),
        ("--keep 0.6", "argument --keep: .* got 0.6; did you mean 60?"),
        ("--keep 0", "got 0"),
        ("--keep 50/101", "got 101"),
        ("--keep half", "such as 50, got 'half'"),
        ("--set linkage=medium", "medium"),
    ],
)
def test_a_value_that_does_not_fit_is_one_sentence(refused: Callable[..., str], line: str, text: str) -> None:
    assert re.search(text, refused(parse, line))


def test_forecasting_alone_keeps_all_tokens() -> None:
    ways = parse("--method faster --keep 100 100/10")
    assert [(each.label, each.setting) for each in ways[1:]] == [
        ("forecasting alone", "tolerance 0.3"),
        ("ATC faster", "keys 10 %"),
    ]


def test_presets_are_methods_and_are_named_however_they_are_put_together() -> None:
    fast, faster = Configuration(ATCConfig.fast()), Configuration(ATCConfig.faster())
    assert parse("--method fast faster --keep 100/12.5") == [Configuration(), fast, faster]
    assert parse("--method atc --keep 100/12.5 --set linkage=ward levels=costly") == [Configuration(), fast]
    assert (fast.label, faster.label) == ("ATC fast", "ATC faster")


def test_tome_is_left_out_where_it_cannot_keep_so_few() -> None:
    assert [each.setting for each in parse("--method tome --keep 25 24 100/10")] == ["", "25 %"]


@pytest.mark.parametrize(
    "way",
    [
        Configuration(),
        Configuration(ATCConfig(r=0.55, window_size=8, levels="all")),
        Configuration(ToMeConfig(r=0.5, features="keys"), Rival("deepcache", 3)),
        Configuration(rival=Rival("todo", 2)),
    ],
)
def test_a_configuration_survives_json(way: Configuration) -> None:
    assert Configuration.from_json(way.json) == way


def test_labels_tell_what_differs_from_the_defaults_or_the_paper() -> None:
    changed: dict[str, Any] = {"r": 0.5, "linkage": "ward", "proportional_attention": False}
    assert Configuration(ATCConfig(**changed)).label == "ATC ward, no proportional attention"
    assert Configuration(ATCConfig.paper(0.5)).label == "ATC average, the paper's"


def test_forecasting_alone_has_a_folder_for_every_configuration() -> None:
    ways = parse("--method atc paper --keep 100 --set linkage=average,ward forecast_tolerance=0.3")
    assert len({each.folder for each in ways}) == len(ways) == 5


def test_different_configurations_have_different_folders() -> None:
    line = "--method atc paper tome --keep 50 25 12.5 --set linkage=average,ward proportional_attention=on,off"
    folders = [each.folder for each in parse(f"{line} --rival steps:0.7 todo:2 todo:4 --with deepcache:2")]
    assert len(set(folders)) == len(folders)
    assert "atc-average-12.5" in folders
