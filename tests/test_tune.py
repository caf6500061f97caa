"""Finding a setting for a pipeline."""

import json
import re
import sys
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from PIL import Image

from atc_diffusion import ATCConfig, Tuning, apply_patch, patched, summary, tune
from atc_diffusion.__main__ import main
from atc_diffusion.tuning import Row, Setting
from tests.helpers.tiny_pipelines import flux, sd15

SIZE: dict[str, Any] = {"height": 64, "width": 64}
UNPATCHED = Row(Setting(None, 20), 10.0, 1.0, float("inf"), 2)


@pytest.fixture
def pipe() -> Any:
    pipe = sd15()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """A folder with a tiny pipeline."""
    folder = tmp_path_factory.mktemp("model")
    sd15().save_pretrained(folder)
    return str(folder)


def row(ratio: float, decibels: float, config: ATCConfig | None, steps: int = 20) -> Row:
    return Row(Setting(config, steps), 10 * ratio, ratio, decibels, 2)


def settings(tuning: Tuning) -> set[str]:
    return {str(row.setting) for row in tuning.rows}


@pytest.mark.slow
def test_it_compares_settings_and_leaves_the_pipeline_alone(pipe):
    attributes, said = set(vars(pipe.unet)), []
    tuning = tune(pipe, "ant", num_inference_steps=20, on_progress=lambda *now: said.append(now), **SIZE)
    assert set(vars(pipe.unet)) == attributes
    merging, fewer = "r_keys=0.125", ("16 steps", "10 steps")
    expected = {"20 steps", "forecasting + 20 steps", f"{merging} + 20 steps", f"{merging} + forecasting + 20 steps"}
    expected |= {"r=0.5, r_keys=0.125 + forecasting + 20 steps", "r_keys=0.25 + 20 steps"}
    assert settings(tuning) == expected | set(fewer) | {f"{merging} + {steps}" for steps in fewer}
    assert tuning.note == ""
    assert [row.ratio for row in tuning.rows] == sorted(row.ratio for row in tuning.rows)
    assert said[0] == ("warming up", 0, 0)
    assert [done for _, done, _ in said[1:]] == list(range(len(said) - 1))
    assert {total for _, _, total in said[1:]} == {len(said) - 1}
    with patched(pipe, tuning.config):
        pipe("ant", num_inference_steps=tuning.num_inference_steps, output_type="pt", **SIZE)


def test_where_no_step_can_be_forecast_it_says_so_and_tries_no_duplicates(pipe):
    tuning = tune(pipe, "ant", num_inference_steps=2, **SIZE)
    merging = {f"r_keys={fraction} + 2 steps" for fraction in (0.125, 0.25)}
    assert settings(tuning) == {"2 steps", "1 step", "r_keys=0.125 + 1 step"} | merging
    assert re.fullmatch(r"Forecasting: none of 2 steps forecast: .+\.", tuning.note)
    assert tuning.note in str(tuning)


def test_further_prompts_are_drawn_with_what_may_turn_out_best(pipe):
    said: list[str] = []
    tuning = tune(pipe, ["ant", "bee"], min_psnr=1000, num_inference_steps=2, on_progress=lambda *x: said.append(x[0]))
    drawn = {str(row.setting): row.num_prompts for row in tuning.rows}
    assert drawn.pop("2 steps") == 2
    assert set(drawn.values()) == {1}
    assert said.count("2 steps") == 2


def test_an_empty_image_is_refused(pipe):
    """As VAEs that overflow in half precision draw it."""
    torch.nn.init.constant_(pipe.vae.decoder.conv_out.weight, float("nan"))
    with pytest.raises(ValueError, match=r"the unpatched pipeline draws an empty image, .* dtype float32"):
        tune(pipe, "ant", num_inference_steps=2, **SIZE)


class Timed(StableDiffusionPipeline):  # type: ignore[misc]  # diffusers is not annotated
    """Takes a second a step, by a clock of its own; one step fails for some prompts."""

    now = 0.0
    fails_for: tuple[str, ...] = ()

    def __call__(self, prompt: str, num_inference_steps: int = 2, **options: Any) -> Any:
        if num_inference_steps == 1 and prompt in self.fails_for:
            raise RuntimeError("too few steps")
        type(self).now += num_inference_steps
        return super().__call__(prompt, num_inference_steps=num_inference_steps, **options)


@pytest.fixture
def timed(pipe, monkeypatch) -> Any:
    monkeypatch.setattr("time.perf_counter", lambda: Timed.now)
    pipe = Timed(**pipe.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_a_setting_that_fails_is_left_out_with_a_warning(timed):
    timed.fails_for = ("ant",)
    with pytest.warns(UserWarning, match="left out 1 step, which fails here: too few steps"):
        tuning = tune(timed, "ant", **SIZE)
    assert "1 step" not in settings(tuning)
    assert tuning.unpatched.setting == Setting(None, 2)


def test_what_fails_for_one_prompt_is_compared_on_those_before(timed):
    alone = tune(timed, "ant", min_psnr=0, **SIZE)
    timed.fails_for = ("bee",)
    with pytest.warns(UserWarning, match="left out 1 step, which fails here: too few steps"):
        tuning = tune(timed, ["ant", "bee", "cow"], min_psnr=0, **SIZE)
    (first,), (row,) = ([row for row in each.rows if str(row.setting) == "1 step"] for each in (alone, tuning))
    assert (row.num_prompts, row.ratio, row.psnr) == (1, 0.5, first.psnr)
    assert tuning.unpatched.num_prompts == 3


def test_what_a_model_cannot_merge_is_not_tried(recwarn):
    pipe = flux()
    pipe.set_progress_bar_config(disable=True)
    tuning = tune(pipe, "a", num_inference_steps=2, **SIZE)
    assert not [warning for warning in recwarn if "left out" in str(warning.message)]
    assert "r_keys=0.125 + 2 steps" in settings(tuning)
    assert not any("r=0.5" in setting for setting in settings(tuning))


def test_the_patch_that_was_there_comes_back(pipe):
    config = ATCConfig(r=0.5)
    apply_patch(pipe, config)
    tune(pipe, "ant", max_seconds=0, num_inference_steps=2, **SIZE)
    assert summary(pipe).config == config


def test_it_stops_when_the_time_is_over(pipe):
    tuning = tune(pipe, ["ant", "bee"], max_seconds=0, num_inference_steps=2, **SIZE)
    assert [row.num_prompts for row in tuning.rows] == [1, 1]


def test_it_takes_the_arguments_of_the_pipeline(pipe):
    pipe = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    image = torch.rand(1, 3, 64, 64)
    tuning = tune(pipe, "ant", max_seconds=0, num_inference_steps=4, image=image, strength=0.5)
    assert len(tuning.rows) == 2


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"prompts": []}, "prompts must be a prompt or several, got []"),
        ({"prompts": None}, "prompts must be a prompt or several, got None"),
        ({"prompts": ["ant", 2]}, "prompts must be a prompt or several, got ['ant', 2]"),
        ({"seed": None}, "seed must be a whole number of at most 64 bits, got None"),
        ({"seed": 1.5}, "seed must be a whole number of at most 64 bits, got 1.5"),
        ({"seed": 2**64}, f"seed must be a whole number of at most 64 bits, got {2**64}"),
        (
            {"guidence_scale": 3.0},
            "StableDiffusionPipeline has no argument 'guidence_scale'; did you mean 'guidance_scale'?",
        ),
        ({"return_dict": False}, "tune sets return_dict itself; it reads the images by name"),
        ({"num_inference_steps": 0}, "num_inference_steps must be a number of steps from 1 up, got 0"),
        ({"num_inference_steps": 2.5}, "num_inference_steps must be a number of steps from 1 up, got 2.5"),
        ({"min_psnr": "high"}, "min_psnr must be a number from 0 up, got 'high'"),
        ({"max_seconds": float("nan")}, "max_seconds must be a number from 0 up, got nan"),
        ({"generator": torch.Generator()}, "tune sets generator itself; give a seed"),
        ({"output_type": "latent"}, "tune sets output_type itself; it compares PIL images"),
        ({"pipe": torch.nn.Linear(1, 1)}, "tune needs a diffusers pipeline that takes num_inference_steps, got Linear"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_drawn(pipe, wrong, sentence):
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        tune(**{"pipe": pipe, "prompts": "ant", "on_progress": pytest.fail} | wrong)


def test_the_fastest_that_is_near_enough_is_the_best():
    fast, faster = ATCConfig.fast(), ATCConfig.faster()
    rows = (row(0.2, 30, None, 5), row(0.35, 47, faster), row(0.55, 50, fast), UNPATCHED)
    assert Tuning(rows, 45).config == faster
    assert Tuning(rows, 45).pays
    assert Tuning(rows, 49).config == fast
    assert Tuning(rows, 25).config == ATCConfig(r=1.0)
    assert Tuning(rows, 25).num_inference_steps == 5
    assert Tuning(rows, 25).advice.splitlines()[1:] == ["pipe(..., num_inference_steps=5)"]
    assert "Fastest at 45 dB or more: r_keys=0.125 + forecasting + 20 steps, 0.35 of the time." in str(Tuning(rows, 45))


def test_where_nothing_pays_the_pipeline_stays_as_it_is():
    tuning = Tuning((UNPATCHED, row(1.1, 50, ATCConfig.fast())), 40)
    assert not tuning.pays
    assert (tuning.config, tuning.num_inference_steps) == (ATCConfig(r=1.0), 20)
    assert tuning.advice == "Nothing pays here: no setting is faster than the unpatched pipeline."


def test_it_names_the_closest_where_nothing_is_near_enough():
    rows = (row(0.2, 30, None, 5), row(0.55, 38.9, ATCConfig.fast()), UNPATCHED)
    assert Tuning(rows, 40).advice == (
        "Nothing pays here: no setting is faster at 40 dB or more. The closest of the faster ones: r_keys=0.125"
        " + 20 steps, 38.9 dB."
    )


def command(model: str, more: str = "") -> list[str]:
    return f"tune {model} --prompts ant --steps 2 --device cpu --max-seconds 0 {more}".split()


def test_the_command_prints_what_it_finds_and_writes_both_files(model, tmp_path, capsys):
    files = f"--json {tmp_path / 'new' / 't.json'} --html {tmp_path / 't.html'}"
    assert main(command(model, f"--size 64 --min-psnr 10 {files}")) == 0
    said = capsys.readouterr()
    assert "r_keys=0.125 + 2 steps" in said.out
    assert "warming up" in said.err
    found = json.loads((tmp_path / "new" / "t.json").read_text())
    assert found["min_psnr"] == 10
    assert "devices: cpu" in found["machine"]
    assert [each["ratio"] for each in found["results"] if each["psnr"] is None] == [1.0]
    assert {each["num_inference_steps"] for each in found["results"]} == {2}
    assert sorted(each["config"] is None for each in found["results"]) == [False, True]
    page = (tmp_path / "t.html").read_text()
    assert page.count("<img ") == 2
    assert "<svg" in page


def test_the_command_tunes_image_to_image_with_another_scheduler(model, tmp_path, capsys):
    Image.fromarray(np.zeros((40, 48, 3), np.uint8)).save(tmp_path / "sketch.png")
    options = "--size 32 --batch-size 2 --scheduler EulerDiscreteScheduler"
    assert main(command(model, f"--image {tmp_path / 'sketch.png'} {options}")) == 0
    assert "2 steps" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ("--size 63", "`height` and `width` have to be divisible by 8"),
        ("--scheduler Euler", "the scheduler Euler does not fit this model; these do: .*DDIMScheduler, "),
        ("--device moon", "there is no device 'moon' here, only cpu"),
        ("--lora nowhere", "there is no folder nowhere; give a folder with a LoRA, or a hub id"),
        ("--image nowhere.png", "No such file or directory: 'nowhere.png'"),
        ("--min-psnr -1", "min_psnr must be a number from 0 up, got -1.0"),
        ("--guidance nan", "--guidance must be a finite number, got nan"),
    ],
)
def test_the_command_says_in_one_sentence_what_does_not_fit(model, more, sentence):
    with pytest.raises(SystemExit, match=f"^python -m atc_diffusion: .*{sentence}"):
        main(command(model, more))


@pytest.mark.parametrize("name", ["/nonexistent", "no/such/model"])
def test_the_command_says_in_one_sentence_what_it_cannot_load(name):
    with pytest.raises(SystemExit, match=f"^python -m atc_diffusion: there is no folder {name}; give a folder with a"):
        main(command(name))


@pytest.mark.parametrize("option", ["--steps", "--size", "--batch-size"])
@pytest.mark.parametrize("value", ["0", "-1", "2.5", "many"])
def test_numbers_that_count_are_whole(capsys, option, value):
    with pytest.raises(SystemExit, match="2"):
        main([*command("model"), f"{option}={value}"])
    assert f"argument {option}: expected a whole number from 1 up, got '{value}'" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--json", "--html"])
@pytest.mark.parametrize(
    ("file", "sentence"),
    [("", "is a folder; give a file, such as"), ("file/t.txt", "cannot be made, because .*file is a file")],
)
def test_a_file_that_cannot_be_written_is_refused_first(tmp_path, option, file, sentence):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match=f"^python -m atc_diffusion: {option} {tmp_path / file} {sentence}"):
        main([*command("nowhere"), option, str(tmp_path / file)])


@pytest.mark.parametrize("package", ["jinja2", "matplotlib"])
def test_a_page_without_its_packages_is_refused_first(model, tmp_path, monkeypatch, package):
    monkeypatch.delitem(sys.modules, "atc_diffusion.tuning_page", raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit, match=rf"needs the package {package}, .*: pip install -e '\.\[tune\]'$"):
        main([*command(model), "--html", str(tmp_path / "t.html")])
