"""From the command line to methods and their names."""

import re
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest

from atc_diffusion import ATCConfig, DPCKNNConfig, ToMeConfig, ViTConfig
from atc_eval import command_line
from atc_eval.grid import Comparison, parse_option
from atc_eval.method import Method
from atc_eval.rivals import Rival


def parse(line: str) -> list[Method]:
    [comparison] = command_line.parse([Comparison], None, line.split())
    methods: list[Method] = comparison.methods()
    return methods


def names(line: str) -> list[tuple[str, str]]:
    """The label and the setting of every method but the unmerged model."""
    return [(each.label, each.setting) for each in parse(line)[1:]]


def test_values_have_their_own_type() -> None:
    texts = ["features=keys,values", "proportional_attention=on,false", "window_size=null,8", "linkage=ward"]
    assert [parse_option(text) for text in texts] == [
        ("features", ("keys", "values")),
        ("proportional_attention", (True, False)),
        ("window_size", (None, 8)),
        ("linkage", ("ward",)),
    ]


@pytest.mark.parametrize(
    "text",
    ["colour=red", "linkage", "linkage=", "r=0.5", "r_keys=0.1", "levels={1: 2}", "linkage=[average", "linkage= "],
)
def test_an_option_of_another_form_is_one_sentence(text: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        parse_option(text)


def test_by_default_it_compares_what_the_papers_table_2_does() -> None:
    methods = parse("--keep 40 100")
    paper = [ATCConfig.paper(0.4, linkage=linkage) for linkage in ("single", "average", "complete")]
    assert methods == [Method(), *map(Method, [ToMeConfig(r=0.4), *paper])]
    assert len(parse("")) == 25
    assert parse("--keep 20")[1:] == parse("--keep 20 --method paper --set linkage=single,average,complete")[1:]


def test_several_values_give_every_combination_and_tome_takes_what_it_has() -> None:
    options = "--set linkage=average,single recluster_threshold=0.1,0.2"
    assert [label for label, _ in names(f"--method atc tome none --keep 50 {options}")] == [
        "ATCConfig(recluster_threshold=0.1)",
        "ATCConfig(recluster_threshold=0.2)",
        "ATCConfig(recluster_threshold=0.1, linkage='single')",
        "ATCConfig(recluster_threshold=0.2, linkage='single')",
        "ToMeConfig(recluster_threshold=0.1)",
        "ToMeConfig(recluster_threshold=0.2)",
    ]


@pytest.mark.parametrize("apart", ["--set linkage=ward linkage=single", "--set linkage=ward --set linkage=single"])
def test_values_of_one_field_given_apart_are_all_tried(apart: str) -> None:
    together = parse("--method atc --keep 50 60 --set linkage=ward,single")
    assert parse(f"--method atc --keep 50 --keep 60 {apart}") == together


def test_queries_and_keys_have_fractions_of_their_own() -> None:
    assert names("--method atc tome --keep 100/10 50/10 100/25 50/25 50/100") == [
        ("ATCConfig()", "keys 10 %"),
        ("ATCConfig()", "50 %, keys 10 %"),
        ("ATCConfig()", "keys 25 %"),
        ("ATCConfig()", "50 %, keys 25 %"),
        ("ATCConfig()", "50 %, keys 100 %"),
        ("ToMeConfig()", "keys 25 %"),
        ("ToMeConfig()", "50 %, keys 25 %"),
        ("ToMeConfig()", "50 %, keys 100 %"),
    ]


def test_rivals_stand_alone_and_together_with_every_merging() -> None:
    line = "--method atc --keep 50 25 --rival steps:0.7 todo:2 --with deepcache:3"
    assert names(line)[2:] == [
        ("fewer steps", "0.7 of the steps"),
        ("ToDo", "keys 25 %"),
        ("ATCConfig() + DeepCache", "50 %, every 3 steps"),
        ("ATCConfig() + DeepCache", "25 %, every 3 steps"),
    ]


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("--rival todo:1", "todo takes a whole number from 2 to 64, got 1"),
        ("--keep 0.6", "--keep 0.6: .* got 0.6; did you mean 60?"),
        ("--keep 0", "got 0"),
        ("--keep 50/101", "got 101"),
        ("--keep 50/", "--keep 50/: .* such as 50 or 100/12.5, got ''"),
        (
            "--method none --with todo:2",
            "--with todo:2 .* nothing merges; give another --method or --keep, or use --rival",
        ),
        ("--keep half", "such as 50 or 100/12.5, got 'half'"),
        ("--set linkage=medium", "medium"),
        ("--methods atc", "--methods"),
    ],
)
def test_a_value_that_does_not_fit_is_one_sentence(refused: Callable[..., str], line: str, text: str) -> None:
    assert re.search(text, refused(parse, line))


def test_presets_are_methods_and_are_named_however_they_are_put_together() -> None:
    fast, faster = Method(ATCConfig.fast()), Method(ATCConfig.faster())
    assert parse("--method fast faster --keep 100/12.5") == [Method(), fast, faster]
    assert parse("--method atc --keep 100/12.5 --set linkage=ward levels=costly") == [Method(), fast]
    assert (fast.label, faster.label) == ("ATCConfig.fast()", "ATCConfig.faster()")
    assert names("--method forecast --keep 100") == [("ATCConfig.forecast()", "100 %")]


def test_tome_is_left_out_where_it_cannot_keep_so_few() -> None:
    assert [setting for _, setting in names("--method tome --keep 25 24 100/10")] == ["25 %"]


@pytest.mark.parametrize(
    "config",
    [
        ATCConfig.fast(0.5, widen_heads=True),
        ATCConfig.paper(0.5, linkage="ward", proportional_attention=True),
        ATCConfig(r=0.5, levels=(1, 2), window_size=None),
        ToMeConfig(r=0.5, stride=4),
        DPCKNNConfig(r=0.5),
        ViTConfig(r=0.5, method="evit"),
    ],
)
def test_a_label_is_code_that_makes_the_configuration(config: Any) -> None:
    names = {"ATCConfig": ATCConfig, "ToMeConfig": ToMeConfig, "DPCKNNConfig": DPCKNNConfig, "ViTConfig": ViTConfig}
    code = Method(config).label.replace("paper(", "paper(r=1, ").replace("ViTConfig(", "ViTConfig(r=1, ")
    strength = ("r", "r_keys")
    made, wanted = asdict(eval(code, names)), asdict(config)
    assert {name: made[name] for name in made if name not in strength} == {
        name: wanted[name] for name in wanted if name not in strength
    }


@pytest.mark.parametrize(
    "method",
    [
        Method(),
        Method(ATCConfig(r=0.55, window_size=8, levels="all")),
        Method(ToMeConfig(r=0.5, features="keys"), Rival("deepcache", 3)),
        Method(ViTConfig(t=8, schedule="linear")),
        Method(rival=Rival("todo", 2)),
    ],
)
def test_a_method_survives_json(method: Method) -> None:
    assert Method.from_json(method.json) == method


def test_what_earlier_versions_wrote_is_read_with_their_defaults() -> None:
    """They had no forecasting, and merged attention in a mask."""
    now = Method(ATCConfig(r=0.5)).json["merge"]
    then = {name: value for name, value in now.items() if name not in ("forecast_tolerance", "widen_heads")}
    read = Method.from_json({"merge": {**then, "share_layers": 1}, "rival": None})
    assert read == Method(ATCConfig(r=0.5))
    with pytest.raises(ValueError, match=r"this version has no ATCConfig\(share_layers=2\)"):
        Method.from_json({"merge": {**then, "share_layers": 2}, "rival": None})
    with pytest.raises(ValueError, match="this version has no OtherConfig"):
        Method.from_json({"merge": {"kind": "OtherConfig"}, "rival": None})


def test_one_choice_that_differs_is_named() -> None:
    ward, average = Method(ATCConfig(linkage="ward")), Method(ATCConfig())
    assert ward.instead(average) == "linkage='average'"
    assert ward.instead(Method(ATCConfig(features="values"))) is None
    assert Method(ATCConfig.paper(0.5)).instead(Method(ToMeConfig(r=0.5))) == "ToMeConfig()"


def test_different_methods_have_different_folders() -> None:
    line = "--method atc paper tome --keep 50 25 12.5 --set linkage=average,ward proportional_attention=on,off"
    folders = [each.folder for each in parse(f"{line} --rival steps:0.7 todo:2 todo:4 --with deepcache:2")]
    assert len(set(folders)) == len(folders)
    assert "atcconfig-12.5" in folders
