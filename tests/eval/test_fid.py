"""The whole experiment on a tiny model: generated, interrupted, divided, scored and reported."""

import csv
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from accelerate import PartialState
from fid import main
from generate import Record, Sampler, Sampling, load_pipeline, read_records, weights_digest
from pictures import Picture, plan
from PIL import Image
from safetensors.torch import load_file, save_file

SCRIPT = Path(__file__).resolve().parents[2] / "eval" / "fid.py"
Draw = Callable[..., Path]


@pytest.fixture
def options(model: Path, draw_pictures: Draw, tmp_path: Path) -> list[str]:
    """A run of six pictures in each set, with two ways of merging."""
    names = tmp_path / "names.txt"
    names.write_text("ant\nbee\ncat\n")
    line = (
        f"--model {model} --class-names {names} --prompt {{}} --size 16 --steps 2 --batch-size 2 --keep 50 "
        f"--method atc tome --reference {draw_pictures('reference', 8)} --features efficientnet-lite0 "
        "--bootstrap 20 --device cpu"
    )
    return line.split()


@pytest.fixture
def sampling(model: Path) -> Sampling:
    return Sampling(
        str(model),
        weights_digest(str(model)),
        steps=2,
        guidance=7.5,
        size=16,
        batch_size=4,
        dtype="float32",
        device="cpu",
    )


def pictures_in(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.glob("sets/*/*.png"))}


def draw(sampling: Sampling, pictures: list[Picture]) -> list[np.ndarray[Any, Any]]:
    state = PartialState(cpu=True)
    return [np.asarray(each) for each in Sampler(load_pipeline(sampling, state.device), sampling, state).draw(pictures)]


def test_the_report_says_everything(options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    main([*options, "--out", str(out), "--proportional-attention", "off", "on", "--show", "1"])
    assert f"wrote {out / 'report.md'}" in capsys.readouterr().out
    report = (out / "report.md").read_text()
    for text in ("n = 6", "8 pictures", "efficientnet-lite0, tensorflow resizing", "## FID", "PSNR in dB", "fid.png"):
        assert text in report
    assert "| ATC average instead of ToMe, proportional attention |" in report
    assert "the paper |" not in report  # another model
    for name in ("fid.png", "fidelity.png", "grid_0001_0.png"):
        assert Image.open(out / name).size[0] > 300

    rows = list(csv.DictReader((out / "results.csv").open()))
    results = json.loads((out / "results.json").read_text())["results"]
    assert [(row["label"], float(row["keep"])) for row in rows] == [
        ("unmerged", 100),
        ("ToMe", 50),
        ("ToMe, proportional attention", 50),
        ("ATC average", 50),
        ("ATC average, proportional attention", 50),
    ]
    assert float(rows[3]["fid"]) == results[3]["fid"] > 0
    assert results[3]["configuration"]["features"] == "hidden_states"
    assert "up_blocks.1.attentions.0.transformer_blocks.0" in results[3]["summary"]
    assert all(result["seconds_per_picture"] > 0 for result in results)
    assert 0 < float(rows[3]["psnr"]) < 58.9


def test_scored_again_nothing_is_generated_and_the_results_are_the_same(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    main([*options, "--out", str(tmp_path / "out")])
    results = (tmp_path / "out" / "results.json").read_bytes()
    monkeypatch.setattr(Sampler, "draw", lambda *_: pytest.fail("generated again"))
    main([*options, "--out", str(tmp_path / "out")])
    assert (tmp_path / "out" / "results.json").read_bytes() == results


def test_a_model_trained_further_is_other_settings(options: list[str], tmp_path: Path) -> None:
    main([*options, "--out", str(tmp_path / "out"), "--method", "none"])
    weights = load_file(tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors")
    weights["conv_in.bias"] += 1
    save_file(weights, tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(SystemExit, match=r"other settings \(weights: '\w+' there, '\w+' now\)"):
        main([*options, "--out", str(tmp_path / "out"), "--method", "none"])


def test_a_folder_takes_more_configurations_but_no_other_settings(options: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    main([*options, "--out", str(out), "--method", "none"])
    main([*options, "--out", str(out), "--linkage", "ward", "--method", "atc"])
    assert [row["label"] for row in csv.DictReader((out / "results.csv").open())] == ["unmerged", "ATC ward"]
    before = pictures_in(out)
    with pytest.raises(SystemExit, match="steps: 2 there, 3 now"):
        main([*options, "--out", str(out), "--steps", "3"])
    assert pictures_in(out) == before


def test_a_damaged_picture_is_made_again_before_scoring(options: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    main([*options, "--out", str(out)])
    before, results = pictures_in(out), (out / "results.csv").read_bytes()
    path = next(out.glob("sets/atc*/0001_1.png"))
    path.write_bytes(path.read_bytes()[:100])
    main([*options, "--out", str(out)])
    assert pictures_in(out) == before
    assert (out / "results.csv").read_text().splitlines()[0] == results.decode().splitlines()[0]


def test_an_incomplete_set_of_an_earlier_command_is_left_out(options: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    main([*options, "--out", str(out)])
    next(out.glob("sets/tome*/0001_1.png")).unlink()
    main([*options, "--out", str(out), "--method", "atc"])
    assert [row["label"] for row in csv.DictReader((out / "results.csv").open())] == ["unmerged", "ATC average"]


def test_the_time_of_the_first_batch_of_a_run_is_not_counted(tmp_path: Path) -> None:
    record = Record(tmp_path / "record-0.json", torch.device("cpu"))
    for seconds in (9.0, 1.0, 2.0):
        record.add(seconds, "summary")
    Record(tmp_path / "record-0.json", torch.device("cpu")).add(8.0, "summary")
    Record(tmp_path / "record-1.json", torch.device("cpu")).add(7.0, "summary")
    assert read_records(tmp_path)["seconds_per_picture"] == 1.5


def test_merging_changes_pictures_and_is_undone_for_the_next_set(options: list[str], tmp_path: Path) -> None:
    main([*options, "--out", str(tmp_path / "one"), "--keep", "50", "40"])
    main([*options, "--out", str(tmp_path / "two"), "--keep", "40", "50", "--method", "tome", "atc"])
    pictures = pictures_in(tmp_path / "one")
    assert pictures == pictures_in(tmp_path / "two")
    assert len({data for name, data in pictures.items() if "0000_0" in name}) == 5


def test_a_picture_does_not_depend_on_its_neighbours_or_their_order(sampling: Sampling) -> None:
    pictures = plan(["ant", "bee", "cat"], [0, 1, 2], 2, "{}", 0)
    together = draw(sampling, pictures[:4])
    backwards = draw(sampling, pictures[3::-1])[::-1]
    alone = [draw(sampling, [picture])[0] for picture in pictures[:4]]
    assert all(np.array_equal(*pair) for pair in zip(together, backwards, strict=True))
    assert all(np.array_equal(*pair) for pair in zip(together, alone, strict=True))


def test_another_batch_size_changes_no_more_than_rounding(sampling: Sampling) -> None:
    """The noise is the same; sums of products are not, to the bit, and a value at .5 can round either way."""
    pictures = plan(["ant", "bee", "cat"], [0, 1], 2, "{}", 0)
    single = Sampling(**{**sampling.json, "batch_size": 1})
    for one, four in zip([draw(single, [each])[0] for each in pictures], draw(sampling, pictures), strict=True):
        assert np.abs(one.astype(int) - four.astype(int)).max() <= 1


def test_killed_with_two_processes_and_resumed_with_one_it_makes_the_same_pictures(
    options: list[str], tmp_path: Path
) -> None:
    main([*options, "--out", str(tmp_path / "whole")])
    out = tmp_path / "out"
    run = launch([*options, "--out", str(out)])
    wait_for(lambda: len(pictures_in(out)) >= 3)
    for process in [psutil.Process(run.pid), *psutil.Process(run.pid).children(recursive=True)]:
        process.kill()
        process.wait()
    killed = pictures_in(out)
    assert 3 <= len(killed) < 18
    main([*options, "--out", str(out)])
    assert pictures_in(out) == pictures_in(tmp_path / "whole")


def test_two_processes_share_the_pictures(options: list[str], tmp_path: Path) -> None:
    main([*options, "--out", str(tmp_path / "whole")])
    run = launch([*options, "--out", str(tmp_path / "out")])
    said, _ = run.communicate()
    assert run.returncode == 0, said
    assert pictures_in(tmp_path / "out") == pictures_in(tmp_path / "whole")
    for folder in (tmp_path / "out" / "sets").iterdir():
        assert sorted(path.name for path in folder.glob("record-*")) == ["record-0.json", "record-1.json"]
    assert said.count("generating, process 1 of 2") > 0
    assert said.count("wrote") == 1


def launch(options: list[str]) -> "subprocess.Popen[str]":
    """`accelerate launch` with two processes; without a GPU, or with `--device cpu`, they run on the CPU."""
    line = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    return subprocess.Popen(
        [*line, str(SCRIPT), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHONPATH": str(SCRIPT.parents[1])},
    )


def wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.01)


def test_the_list_names_every_picture_and_generates_none(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([*options, "--list", "--classes", "2,0", "--seed", "5", "--out", str(tmp_path / "out")])
    assert capsys.readouterr().out.splitlines() == [
        "class\timage\tseed\tfile\tprompt",
        "2\t0\t25\t0002_0.png\tcat",
        "2\t1\t26\t0002_1.png\tcat",
        "0\t0\t5\t0000_0.png\tant",
        "0\t1\t6\t0000_1.png\tant",
    ]
    assert not (tmp_path / "out").exists()


def test_by_default_it_lists_the_papers_2000_pictures(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--list"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2001
    assert lines[1] == "0\t0\t0\t0000_0.png\tA high quality photograph of a tench, Tinca tinca."
    assert lines[2000].startswith("999\t1\t9991\t0999_1.png\tA high quality photograph of a toilet tissue")


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ("--keep 0.6", "did you mean 60"),
        ("--linkage medium", "medium"),
        ("--classes 4", "does not name different classes of 0..2"),
        ("--classes 1 --images-per-class 1", "1 x 1 pictures are too few"),
        ("--reference nowhere", "nowhere"),
        ("--device cuda", "--device cuda, but the device here is cpu"),
        ("--model no/model", "cannot load the model 'no/model'"),
        ("--class-names nowhere.txt", "nowhere.txt"),
        ("--show 3", "--show 3, but there are no pictures of that class"),
        ("--features inception --inception-weights nowhere.pth", "nowhere.pth is no file"),
    ],
)
def test_a_value_that_does_not_fit_is_one_sentence_and_generates_nothing(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: str, text: str
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SystemExit) as error:
        main([*options, "--out", str(tmp_path / "out"), *wrong.split()])
    assert text in str(error.value)
    assert "\n" not in str(error.value)
    assert pictures_in(tmp_path / "out") == {}


@pytest.mark.parametrize("wrong", ["--batch-size 0", "--steps -1", "--size many", "--bootstrap 1"])
def test_counts_are_positive(options: list[str], wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([*options, *wrong.split()])
    option, value = wrong.split()
    assert re.search(rf"argument {option}: expected a whole number .* got '{value}'", capsys.readouterr().err)


def test_a_folder_that_cannot_be_made_is_one_sentence(options: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match=r"fid\.py: .*file"):
        main([*options, "--out", str(tmp_path / "file" / "out")])
