"""From the command line to configurations and their names."""

import argparse
from dataclasses import fields
from typing import Any

import pytest
from configurations import Configuration, add_merge_options, grid, merge_options, option_name

from atc_diffusion import ATCConfig, ToMeConfig


def parse(line: str) -> dict[str, list[Any]]:
    parser = argparse.ArgumentParser()
    add_merge_options(parser)
    return merge_options(parser.parse_args(line.split()))


def test_every_field_of_the_configuration_is_an_option_with_help() -> None:
    parser = argparse.ArgumentParser()
    add_merge_options(parser)
    helps = {action.dest: action.help or "" for action in parser._actions}
    for field in fields(ATCConfig):
        if field.name != "r":
            assert len(helps[option_name(field.name)].split("(default")[0]) > 20, field.name


def test_values_have_the_type_of_the_field() -> None:
    line = "--token-features keys --proportional-attention on off --max-downsample 2 none --modules mlp,cross_attention"
    assert parse(line) == {
        "features": ["keys"],
        "proportional_attention": [True, False],
        "max_downsample": [2, None],
        "modules": [("mlp", "cross_attention")],
    }


def test_a_flag_is_on_or_off(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--proportional-attention perhaps")
    assert "expected on or off, got 'perhaps'" in capsys.readouterr().err


def test_the_default_is_the_papers_setting_after_the_unmerged_model() -> None:
    assert grid(["atc"], [40, 100], {}) == [Configuration(), Configuration(ATCConfig.paper(0.4))]


def test_several_values_give_every_combination_and_tome_takes_what_it_has() -> None:
    options = {"linkage": ["average", "single"], "merge": ["tokens", "keys_values"]}
    labels = [each.label for each in grid(["atc", "tome", "none"], [50], options)]
    assert labels == [
        "unmerged",
        "ATC average",
        "ATC average, merge keys_values",
        "ATC single",
        "ATC single, merge keys_values",
        "ToMe",
        "ToMe, merge keys_values",
    ]


def test_tome_is_left_out_where_it_cannot_keep_so_few() -> None:
    assert [each.keep for each in grid(["tome"], [25, 24, 10], {})] == [100, 25]


@pytest.mark.parametrize(("keep", "text"), [(0.6, r"0\.6; did you mean 60\?"), (0, "got 0"), (101, "got 101")])
def test_keep_is_a_percentage(keep: float, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        grid(["atc"], [keep], {})


def test_the_configurations_own_checks_hold() -> None:
    with pytest.raises(ValueError, match="medium"):
        grid(["atc"], [50], {"linkage": ["medium"]})


@pytest.mark.parametrize(
    "merge",
    [None, ATCConfig(r=0.55, modules=("mlp", "self_attention"), max_downsample=2), ToMeConfig(r=0.5, features="keys")],
)
def test_a_configuration_survives_json(merge: ATCConfig | ToMeConfig | None) -> None:
    assert Configuration.from_json(Configuration(merge).json) == Configuration(merge)


def test_different_configurations_have_different_folders() -> None:
    line = "--linkage average ward --merge tokens keys_values --proportional-attention on off"
    folders = [each.folder for each in grid(["atc", "tome"], [50, 25, 12.5], parse(line))]
    assert len(set(folders)) == len(folders) == 1 + 8 * 3 + 4 * 2
    assert "atc-average-proportional-attention_12.5" in folders
