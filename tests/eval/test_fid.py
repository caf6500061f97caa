"""The whole experiment on a tiny model: generated, interrupted, divided, scored and reported."""

import csv
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from accelerate import PartialState
from safetensors.torch import load_file, save_file

from draw.configuration import Configuration
from draw.pictures import Picture, plan
from draw.pipeline import Sampling
from draw.sampler import Sampler
from fid import main

SCRIPT = Path(__file__).resolve().parents[2] / "eval" / "fid.py"
Draw = Callable[..., Path]
Rows = list[dict[str, str]]
Run = Callable[..., tuple[Path, Rows]]


@pytest.fixture
def options(model: Path, draw_pictures: Draw, tmp_path: Path) -> list[str]:
    """A run of six pictures in each of two sets."""
    names = tmp_path / "names.txt"
    names.write_text("ant\nbee\ncat\n")
    line = (
        f"--model {model} --class-names {names} --prompt {{}} --size 64 --steps 2 --batch-size 2 --keep 50 "
        f"--method paper --reference {draw_pictures('reference', 8)} --features efficientnet-lite0 "
        "--bootstrap 20 --device cpu"
    )
    return line.split()


@pytest.fixture
def run(options: list[str], tmp_path: Path) -> Run:
    """Runs the command with more options; returns its folder and the rows of its results."""

    def run(line: str = "", folder: str = "out") -> tuple[Path, Rows]:
        out = tmp_path / folder
        main([*options, "--out", str(out), *line.split()])
        return out, list(csv.DictReader((out / "results.csv").open()))

    return run


@pytest.fixture
def sampling(model: Path) -> Sampling:
    return Sampling(str(model), steps=2, guidance=7.5, size=64, batch_size=4, device="cpu")


def pictures_in(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.glob("sets/*/*.png"))}


def draw(sampling: Sampling, pictures: list[Picture]) -> list[np.ndarray[Any, Any]]:
    sampler = Sampler(sampling, PartialState(cpu=True))
    return [np.asarray(each) for each in sampler.draw(Configuration(), pictures)]


def test_the_report_has_everything(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    out, rows = run(
        "--method paper tome --set proportional_attention=off,on --rival steps:0.5 --with deepcache:2 --show 1 --time 1"
    )
    assert f"wrote {out / 'report.html'}" in capsys.readouterr().out
    report = (out / "report.md").read_text()
    for text in (
        "n = 6",
        "64 x 64",
        "8 pictures",
        "efficientnet-lite0, tensorflow resizing",
        "Speed at equal fidelity",
    ):
        assert text in report
    assert "in the paper" not in report  # another model
    for name in ("fidelity-and-time.svg", "report.html"):
        assert (out / name).stat().st_size > 1000
    assert [row["method"] for row in rows] == [
        "unmerged",
        "ToMe",
        "ToMe + DeepCache",
        "ToMe, proportional attention",
        "ToMe, proportional attention + DeepCache",
        "fewer steps",
        "ATC average, the paper's",
        "ATC average, the paper's + DeepCache",
        "ATC average, the paper's, proportional attention",
        "ATC average, the paper's, proportional attention + DeepCache",
    ]
    assert [row["setting"] for row in rows[:3]] == ["", "50 %", "50 %, every 2 steps"]
    results = json.loads((out / "results.json").read_text())["results"]
    assert float(rows[6]["fid"]) == pytest.approx(results[6]["fid"])
    assert results[6]["configuration"]["merge"]["features"] == "hidden_states"
    assert rows[0]["ratio"] == "1.0"
    assert all(float(row["seconds"]) > 0 for row in rows)
    assert 0 < float(rows[6]["psnr"]) < 58.9


def test_a_rerun_draws_damaged_pictures_again_and_nothing_else(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    out, _ = run()
    pictures, results = pictures_in(out), (out / "results.json").read_bytes()
    path = next(out.glob("sets/atc*/0001_1.png"))
    path.write_bytes(path.read_bytes()[:100])
    run()
    assert pictures_in(out) == pictures
    monkeypatch.setattr(Sampler, "draw", lambda *_: pytest.fail("drawn again"))
    run()
    assert (out / "results.json").read_bytes() == results


def test_a_folder_takes_more_configurations_but_no_other_settings(run: Run, model: Path) -> None:
    out, _ = run("--method none")
    _, rows = run("--method atc --set linkage=ward")
    assert [row["method"] for row in rows] == ["unmerged", "ATC ward"]
    before = pictures_in(out)
    with pytest.raises(SystemExit, match="steps: 2 there, 3 now"):
        run("--steps 3")
    weights = load_file(model / "unet" / "diffusion_pytorch_model.safetensors")
    weights["conv_in.bias"] += 1
    save_file(weights, model / "unet" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(SystemExit, match=r"other settings \(weights: '\w+' there, '\w+' now\)"):
        run("--method none")
    assert pictures_in(out) == before


def test_an_incomplete_set_of_an_earlier_command_is_left_out(run: Run) -> None:
    out, _ = run("--method paper tome")
    next(out.glob("sets/tome*/0001_1.png")).unlink()
    _, rows = run()
    assert [row["method"] for row in rows] == ["unmerged", "ATC average, the paper's"]


def test_more_configurations_are_timed_again_in_turn_with_the_others(run: Run) -> None:
    """Rounds that lack a configuration count no more."""
    run("--method none --time 2")
    out, rows = run("--method tome --time 1")
    rounds = json.loads((out / "times.json").read_text())
    assert [sorted(each) for each in rounds] == [["unmerged"], ["unmerged"], ["tome-50", "unmerged"]]
    seconds = {row["method"]: float(row["seconds"]) for row in rows}
    assert seconds == {"unmerged": rounds[2]["unmerged"], "ToMe": rounds[2]["tome-50"]}


def test_pictures_of_a_rival_are_stamped_and_resumed(run: Run) -> None:
    line = "--method none --rival todo:2 tomesd:50"
    out, _ = run(line)
    before = pictures_in(out)
    assert len({data for name, data in before.items() if "0001_1" in name}) == 3
    for path in (out / "sets").glob("*/0001_1.png"):
        path.unlink()
    run(line)
    assert pictures_in(out) == before


def test_merging_changes_pictures_and_is_undone_for_the_next_set(run: Run) -> None:
    one, two = run("--method paper tome", "one")[0], run("--method tome paper", "two")[0]
    pictures = pictures_in(one)
    assert pictures == pictures_in(two)
    assert len({data for name, data in pictures.items() if "0000_0" in name}) == 3


def test_a_picture_does_not_depend_on_its_neighbours_or_their_order(sampling: Sampling) -> None:
    pictures = plan(["ant", "bee", "cat"], [0, 1, 2], 2, "{}", 0)
    together = draw(sampling, pictures[:4])
    backwards = draw(sampling, pictures[3::-1])[::-1]
    alone = [draw(sampling, [picture])[0] for picture in pictures[:4]]
    assert all(np.array_equal(*pair) for pair in zip(together, backwards, strict=True))
    assert all(np.array_equal(*pair) for pair in zip(together, alone, strict=True))


def test_another_batch_size_changes_no_more_than_rounding(sampling: Sampling) -> None:
    """The noise is the same; sums of products differ in their last bits, and a value at .5 can round either way."""
    pictures = plan(["ant", "bee", "cat"], [0, 1], 2, "{}", 0)
    single = replace(sampling, batch_size=1)
    for one, four in zip([draw(single, [each])[0] for each in pictures], draw(sampling, pictures), strict=True):
        assert np.abs(one.astype(int) - four.astype(int)).max() <= 1


def test_two_processes_share_the_pictures_and_resume_after_being_killed(options: list[str], tmp_path: Path) -> None:
    main([*options, "--out", str(tmp_path / "whole")])
    out = tmp_path / "out"
    launched = launch([*options, "--out", str(out)])
    wait_for(lambda: len(pictures_in(out)) >= 3)
    for process in [psutil.Process(launched.pid), *psutil.Process(launched.pid).children(recursive=True)]:
        process.kill()
        process.wait()
    assert 3 <= len(pictures_in(out)) < 12
    launched = launch([*options, "--out", str(out)])
    said, _ = launched.communicate()
    assert launched.returncode == 0, said
    assert pictures_in(out) == pictures_in(tmp_path / "whole")
    assert sorted(path.name for path in out.glob("sets/atc*/record-*")) == ["record-0.json", "record-1.json"]
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
