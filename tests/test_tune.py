"""Finding a setting for a pipeline."""

from typing import Any

import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline

from atc_diffusion import ATCConfig, Tuning, apply_patch, patched, summary, tune
from atc_diffusion.__main__ import main
from atc_diffusion.trials import Row, Way
from tests.helpers.tiny_pipelines import sd15

SIZE: dict[str, Any] = {"height": 64, "width": 64}
UNPATCHED = Row(Way(None, 20), 10.0, 1.0, float("inf"), 2)


@pytest.fixture
def pipe() -> Any:
    pipe = sd15()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def row(ratio: float, decibels: float, config: ATCConfig | None, steps: int = 20) -> Row:
    return Row(Way(config, steps), 10 * ratio, ratio, decibels, 2)


def test_it_compares_ways_and_leaves_the_pipeline_alone(pipe):
    attributes, said = set(vars(pipe.unet)), []
    tuning = tune(
        pipe, ["ant", "bee"], min_psnr=0, num_inference_steps=10, on_progress=lambda *now: said.append(now), **SIZE
    )
    assert set(vars(pipe.unet)) == attributes
    ways = [str(row.way) for row in tuning.rows]
    for part in ("10 steps", "forecasting + 10 steps", "r=1.0, r_keys=0.125 + forecasting + 10 steps", "5 steps"):
        assert part in ways
    assert [row.ratio for row in tuning.rows] == sorted(row.ratio for row in tuning.rows)
    assert said[0] == ("warming up", 0, 0)
    assert all(done < total for _, done, total in said[1:])
    with patched(pipe, tuning.config):
        pipe("ant", num_inference_steps=tuning.num_inference_steps, output_type="pt", **SIZE)


def test_the_patch_that_was_there_comes_back(pipe):
    config = ATCConfig(r=0.5)
    apply_patch(pipe, config)
    tune(pipe, "ant", max_seconds=0, num_inference_steps=2, **SIZE)
    assert summary(pipe).config == config


def test_it_stops_when_the_time_is_over(pipe):
    tuning = tune(pipe, ["ant", "bee"], max_seconds=0, num_inference_steps=2, **SIZE)
    assert [row.pictures for row in tuning.rows] == [1, 1]


def test_it_takes_the_arguments_of_the_pipeline(pipe):
    pipe = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    image = torch.rand(1, 3, 64, 64)
    tuning = tune(pipe, "ant", max_seconds=0, num_inference_steps=4, image=image, strength=0.5)
    assert len(tuning.rows) == 2


def test_no_prompt_is_refused(pipe):
    with pytest.raises(ValueError, match="prompts must be a prompt or several, got none"):
        tune(pipe, [])


def test_no_step_is_refused(pipe):
    with pytest.raises(ValueError, match="num_inference_steps must be a number of steps from 1 up, got 0"):
        tune(pipe, "ant", num_inference_steps=0)


def test_the_fastest_that_is_near_enough_is_the_best():
    fast, faster = ATCConfig.fast(), ATCConfig.faster()
    rows = (row(0.2, 30, None, 5), row(0.35, 47, faster), row(0.55, 50, fast), UNPATCHED)
    assert Tuning(rows, 45).config == faster
    assert Tuning(rows, 49).config == fast
    assert Tuning(rows, 25).config == ATCConfig(r=1.0)
    assert Tuning(rows, 25).num_inference_steps == 5
    assert "Fastest at 45 dB or more: r=1.0, r_keys=0.125 + forecasting + 20 steps, 0.35 of the time." in str(
        Tuning(rows, 45)
    )


def test_where_nothing_pays_the_pipeline_stays_as_it_is():
    tuning = Tuning((UNPATCHED, row(1.1, 50, ATCConfig.fast())), 40)
    assert (tuning.config, tuning.num_inference_steps) == (ATCConfig(r=1.0), 20)


def test_it_names_the_closest_where_nothing_is_near_enough():
    rows = (row(0.2, 30, None, 5), row(0.55, 38.9, ATCConfig.fast()), UNPATCHED)
    expected = "Nothing is faster at 40 dB or more. The closest: r=1.0, r_keys=0.125 + 20 steps, 38.9 dB."
    assert Tuning(rows, 40).advice == expected
    assert Tuning((UNPATCHED,), 40).advice == "Nothing is faster than the unpatched pipeline here."


def test_the_command_prints_what_it_finds(tmp_path, capsys):
    sd15().save_pretrained(tmp_path / "model")
    assert main(f"tune {tmp_path / 'model'} --prompt ant --steps 2 --size 64 --max-seconds 0".split()) == 0
    said = capsys.readouterr()
    assert "2 steps" in said.out
    assert "warming up" in said.err


@pytest.mark.parametrize("model", ["/nonexistent", "no/such/model"])
def test_the_command_says_in_one_sentence_what_it_cannot_load(model):
    with pytest.raises(SystemExit, match=f"^python -m atc_diffusion: there is no folder {model}; give a folder with a"):
        main(["tune", model, "--prompt", "ant"])


def test_the_command_says_in_one_sentence_what_the_pipeline_refuses(tmp_path):
    sd15().save_pretrained(tmp_path / "model")
    with pytest.raises(SystemExit, match=r"^python -m atc_diffusion: `height` and `width` have to be divisible by 8"):
        main(f"tune {tmp_path / 'model'} --prompt ant --size 63".split())
