"""The tool that finds a setting, on a tiny model."""

import json
from pathlib import Path
from typing import Any

import DeepCache
import pandas as pd
import pytest
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image

import atc_diffusion
from atc_diffusion import ATCConfig
from draw.configuration import Configuration
from draw.pictures import Picture
from draw.rivals import Rival
from draw.sampler import Sampler
from draw.trials import Trial
from report.advice import advice
from score.comparison import promising
from tune import main


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
            "configuration": Configuration(ATCConfig(r=int(name[-2:]) / 100) if name.startswith("merge") else None),
        }
        for name, value in psnr.items()
    ]
    return pd.DataFrame(rows)


def test_it_compares_says_what_to_use_and_writes_both_files(
    options: list[str], tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([*options, "--min-psnr", "10", "--json", str(tmp_path / "t.json"), "--html", str(tmp_path / "t.html")])
    said = capsys.readouterr().out
    for text in ("unmerged", "ATC ward", " + fewer steps", "DeepCache", "PSNR (dB)"):
        assert text in said
    rows = json.loads((tmp_path / "t.json").read_text())["results"]
    assert [row["ratio"] for row in rows if row["method"] == "unmerged"] == [1.0]
    assert all(row["psnr"] > 10 for row in rows if row["method"] != "unmerged")
    assert any(row["code"].endswith("# and draw with 0.8 of the steps") for row in rows)
    pipe = StableDiffusionPipeline.from_pretrained(model, safety_checker=None)
    for lines in filter(None, (row["code"] for row in rows)):
        exec(lines, {"atc_diffusion": atc_diffusion, "DeepCache": DeepCache, "pipe": pipe})
    assert (tmp_path / "t.html").read_text().count("<img ") == sum(row["pictures"] for row in rows) > len(rows)


def test_a_rival_that_fails_on_the_model_is_left_out(
    options: list[str], model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """DeepCache needs a middle block."""
    pipe = StableDiffusionPipeline.from_pretrained(model, safety_checker=None)
    pipe.unet = UNet2DConditionModel.from_config(pipe.unet.config, mid_block_type=None)
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
    with pytest.raises(SystemExit, match="stopped; nothing could be compared yet"):
        main(options)


def test_the_next_prompts_leave_out_what_is_slow_or_far() -> None:
    ways = [Configuration(), *(Configuration(rival=Rival("steps", share)) for share in (0.7, 0.5, 0.35, 0.3))]
    figures = zip(ways, [0, 4, 5, 1, 2], [1.0, 0.7, 0.5, 1.1, 0.3], strict=True)  # 36, 34, 48 and 42 dB
    trials = [
        Trial(way, Picture(0, 0, "ant", 0), Image.new("RGB", (16, 16), (100 + error,) * 3), seconds)
        for way, error, seconds in figures
    ]
    assert promising(trials, ways, min_psnr=40) == [ways[0], ways[1], ways[4]]
    assert promising(trials, ways, min_psnr=50) == []


def test_the_fastest_merging_that_is_near_enough_is_advised() -> None:
    words, line = advice(results(merge_50=39, merge_65=41, merge_70=50), min_psnr=40)
    assert line == "atc_diffusion.apply_patch(pipe, r=0.65)"
    assert "0.65 of the time at 41.0 dB" in words


def test_a_rival_that_is_ahead_is_named() -> None:
    words, line = advice(results(merge_70=45, steps_60=42, steps_50=30), min_psnr=40)
    assert line == "atc_diffusion.apply_patch(pipe, r=0.7)"
    assert "Faster without merging: steps (50 %) takes 0.60" in words


@pytest.mark.parametrize("rows", [{"merge_98": 50.0}, {"merge_99": 50.0, "steps_80": 41.0}])
def test_it_says_when_nothing_that_merges_is_faster(rows: dict[str, float]) -> None:
    words, line = advice(results(**rows), min_psnr=40)
    assert words.startswith("Merging does not pay here: no setting is faster than the unmerged model.")
    assert ("Without merging, steps (50 %) takes 0.80" in words) == ("steps_80" in rows)
    assert line == ""


def test_it_names_the_closest_that_is_faster_and_what_accepts_it() -> None:
    words, line = advice(results(merge_55=38.9, merge_50=36), min_psnr=40)
    assert "No merging is faster at 40 dB or better." in words
    assert "The closest: merge (50 %) takes 0.55 of the time at 38.9 dB; --min-psnr 38 accepts it." in words
    assert line == ""
