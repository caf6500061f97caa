"""The tool that finds a setting, on a tiny model."""

import json
from pathlib import Path
from typing import Any

import DeepCache
import pandas as pd
import pytest
from configurations import Configuration
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from generate import Sampler
from rivals import Rival
from trials import promising
from tune import advice, main

import atc_diffusion
from tests.conftest import UNET


@pytest.fixture
def options(model: Path) -> list[str]:
    return f"--model {model} --prompt ant bee --steps 4 --device cpu".split()


def results(**psnr: float) -> pd.DataFrame:
    """Rows by name: "merge_70" takes 0.70 of the time, and merges."""
    rows = [
        {
            "method": name.split("_")[0],
            "setting": "50 %",
            "ratio": int(name.split("_")[1]) / 100,
            "psnr": value,
            "code": f"{name}()" if name.startswith("merge") else "",
        }
        for name, value in psnr.items()
    ]
    return pd.DataFrame(rows)


def test_it_compares_says_what_to_use_and_writes_both_files(
    options: list[str], tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([*options, "--within", "10", "--json", str(tmp_path / "t.json"), "--html", str(tmp_path / "t.html")])
    said = capsys.readouterr().out
    for text in ("unmerged", "ATC ward", " + fewer steps", "DeepCache", "PSNR (dB)"):
        assert text in said
    rows = json.loads((tmp_path / "t.json").read_text())["results"]
    assert [row["ratio"] for row in rows if row["method"] == "unmerged"] == [1.0]
    assert all(row["psnr"] > 10 for row in rows if row["method"] != "unmerged")
    assert any(row["code"].endswith("# and draw with num_inference_steps=3") for row in rows)
    pipe = StableDiffusionPipeline.from_pretrained(model, safety_checker=None)
    for lines in filter(None, (row["code"] for row in rows)):
        exec(lines, {"atc_diffusion": atc_diffusion, "DeepCache": DeepCache, "pipe": pipe})
    assert (tmp_path / "t.html").read_text().count("<img ") == sum(row["pictures"] for row in rows) > len(rows)


def test_a_rival_that_fails_on_the_model_is_left_out(
    options: list[str], model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """DeepCache needs a middle block."""
    pipe = StableDiffusionPipeline.from_pretrained(model, safety_checker=None)
    pipe.unet = UNet2DConditionModel(**UNET, mid_block_type=None)
    pipe.save_pretrained(model)
    main([*options, "--prompt", "ant", "--steps", "2"])
    said = capsys.readouterr()
    assert "left out DeepCache (every 2 steps), which fails here: " in said.out + said.err
    assert "ATC ward" in said.out


def interrupt(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Ctrl-C once `after` whole pictures are drawn."""
    drawn: list[Any] = []
    original = Sampler.draw

    def draw(self: Sampler, *args: Any, **kwargs: Any) -> Any:
        if "steps" not in kwargs:  # two steps warm up
            drawn.append(args)
        if len(drawn) > after:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Sampler, "draw", draw)


def test_stopped_it_reports_what_it_has(
    options: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupt(monkeypatch, after=3)
    main(options)
    said = capsys.readouterr().out
    assert said.count("ATC ward") >= 2
    assert "fewer steps" not in said


def test_stopped_too_early_it_says_so(options: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(monkeypatch, after=1)
    with pytest.raises(SystemExit, match="stopped before anything could be compared"):
        main(options)


def test_the_next_prompts_leave_out_what_is_slow_or_far() -> None:
    ways = [Configuration(rival=Rival("steps", steps)) for steps in (14, 10, 7, 5)]
    figures = {"psnr": [float("nan"), 36.0, 34.0, 50.0], "ratio": [1.0, 0.7, 0.5, 1.1]}
    names = {"method": [each.label for each in ways], "setting": [each.setting for each in ways]}
    results = pd.DataFrame(names | figures)
    assert promising(results, ways, within=40) == [Configuration(), ways[1]]
    assert promising(results, ways, within=45) == []


def test_the_fastest_merging_that_is_near_enough_is_advised() -> None:
    words, line = advice(results(merge_50=39, merge_60=41, merge_70=50), within=40)
    assert line == "merge_60()"
    assert "0.60 of the time at 41.0 dB" in words


def test_a_rival_that_is_ahead_is_named() -> None:
    words, line = advice(results(merge_70=45, steps_60=42, steps_50=30), within=40)
    assert line == "merge_70()"
    assert "Ahead of it without merging: steps (50 %) takes 0.60" in words


@pytest.mark.parametrize("rows", [{"merge_98": 50.0}, {"merge_60": 39.0}, {"merge_120": 50.0, "steps_80": 41.0}])
def test_it_says_when_merging_does_not_pay(rows: dict[str, float]) -> None:
    words, line = advice(results(**rows), within=40)
    assert words.startswith("Merging does not pay here: no setting within 40 dB is faster")
    assert ("steps (50 %) takes 0.80" in words) == ("steps_80" in rows)
    assert line == ""


@pytest.mark.parametrize(("wrong", "text"), [("--model no/model", "cannot load the model 'no/model'")])
def test_what_does_not_fit_is_one_sentence(
    options: list[str], monkeypatch: pytest.MonkeyPatch, wrong: str, text: str
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SystemExit) as error:
        main([*options, *wrong.split()])
    assert text in str(error.value)
    assert "\n" not in str(error.value)
