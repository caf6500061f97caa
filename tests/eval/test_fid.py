"""The whole experiment on a tiny model: planned, drawn, interrupted, divided, scored and reported."""

import csv
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from accelerate import PartialState
from safetensors.torch import load_file, save_file

import fid
from atc_diffusion import ATCConfig, ToMeConfig
from atc_eval.draw.images import PlannedImage, plan
from atc_eval.draw.sampler import Sampler
from atc_eval.draw.sampling import Sampling
from atc_eval.draw.sets import make_sets
from atc_eval.method import Method
from tests.eval.conftest import random_images

ROOT = Path(__file__).resolve().parents[2]
METHODS = "--method paper --rival todo:2 tomesd:50"
Rows = list[dict[str, str]]
Run = Callable[..., Rows]


@pytest.fixture(scope="module")
def options(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A run of six images in each set."""
    folder = tmp_path_factory.mktemp("options")
    (folder / "names.txt").write_text("ant\nbee\ncat\n")
    line = (
        f"--model {model} --class-names {folder / 'names.txt'} --prompt {{}} --size 64 --steps 2 --batch-size 2 "
        f"--keep 50 --reference {random_images(folder / 'reference', 8)} --features efficientnet-lite0 "
        "--bootstrap 20 --device cpu"
    )
    return line.split()


@pytest.fixture(scope="module")
def whole(options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole experiment, for tests to copy."""
    out: Path = tmp_path_factory.mktemp("whole") / "out"
    fid.main([*options, "--out", str(out), *METHODS.split(), "--time", "2"])
    return out


@pytest.fixture
def out(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "out")


@pytest.fixture
def run(options: list[str], out: Path) -> Run:
    """Runs the command again with other options, and gives the rows of its results."""

    def run(line: str) -> Rows:
        fid.main([*options, "--out", str(out), *line.split()])
        return list(csv.DictReader((out / "results.csv").open()))

    return run


@pytest.fixture
def sampling(model: Path) -> Sampling:
    return Sampling(str(model), steps=2, guidance=7.5, size=64, batch_size=4, device="cpu")


def images_in(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.glob("sets/*/*.png"))}


def draw(sampling: Sampling, images: list[PlannedImage], *methods: Method) -> list[np.ndarray[Any, Any]]:
    """The images by the last of the `methods`, after those by the others."""
    sampler = Sampler(sampling, PartialState(cpu=True))
    for method in methods or [Method()]:
        drawn = sampler.draw(method, images)
    return [np.asarray(each) for each in drawn]


@pytest.mark.slow
def test_the_report_has_everything(run: Run, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = "--method paper tome --rival todo:2 tomesd:50 --with deepcache:2 --show 1 --time 1"
    rows = run(f"{line} --set proportional_attention=off")
    said = capsys.readouterr().out
    assert "7 sets of 6 images, 2 steps each: 42 images, of which 24 are drawn already." in said
    assert re.search(
        r"The first batch took [\d.]+ s on .* this process takes [\d.]+ hours for the other 16 images", said
    )
    assert f"wrote {out / 'report.html'}" in said
    report = (out / "report.md").read_text()
    for text in ("n = 6", "64 x 64", "8 images", "efficientnet-lite0, clean resizing", "Speed at equal fidelity"):
        assert text in report
    assert re.search(r"atc_diffusion \S+ \(commit \w+", report)
    assert "in the paper" not in report  # another model
    for name in ("fidelity-and-time.svg", "report.html"):
        assert (out / name).stat().st_size > 1000
    assert [(row["method"], row["setting"]) for row in rows] == [
        ("unmerged", ""),
        ("ToDo", "keys 25 %"),
        ("tomesd", "50 %"),
        ("ToMeConfig()", "50 %"),
        ("ToMeConfig() + DeepCache", "50 %, every 2 steps"),
        ("ATCConfig.paper()", "50 %"),
        ("ATCConfig.paper() + DeepCache", "50 %, every 2 steps"),
    ]
    results = json.loads((out / "results.json").read_text())["results"]
    assert float(rows[5]["fid"]) == pytest.approx(results[5]["fid"])
    assert results[5]["config"]["merge"]["features"] == "hidden_states"
    assert rows[0]["ratio"] == "1.0"
    assert all(float(row["seconds"]) > 0 for row in rows)
    assert 0 < float(rows[5]["psnr"]) < 58.9


@pytest.mark.slow
def test_a_rerun_draws_damaged_images_again_and_nothing_else(
    run: Run, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, results = images_in(out), json.loads((out / "results.json").read_text())["results"]
    assert len({data for name, data in images.items() if "0001_1" in name}) == 4  # by four methods
    for path in out.glob("sets/*/0001_1.png"):
        path.write_bytes(path.read_bytes()[:100])
    run(METHODS)
    assert images_in(out) == images
    monkeypatch.setattr(Sampler, "draw", lambda *_: pytest.fail("drawn again"))
    run(METHODS)
    assert json.loads((out / "results.json").read_text())["results"] == results


@pytest.mark.slow
def test_other_settings_and_weights_are_refused(run: Run, out: Path, model: Path, tmp_path: Path) -> None:
    before = images_in(out)
    with pytest.raises(SystemExit, match=r"out was begun with other settings \(steps: 2, now 3\); give another --out"):
        run("--steps 3")
    other = shutil.copytree(model, tmp_path / "other")
    weights = load_file(other / "unet" / "diffusion_pytorch_model.safetensors")
    weights["conv_in.bias"] += 1
    save_file(weights, other / "unet" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(SystemExit, match=r"weights: '\w+', now '\w+'"):
        run(f"--model {other}")
    assert images_in(out) == before


def test_a_command_that_fails_before_it_draws_does_not_claim_the_folder(
    options: list[str], tmp_path: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    line = [*options, "--out", str(tmp_path / "out"), "--method", "none"]
    without = [each for each in line if each != "--reference"]
    without.remove(line[line.index("--reference") + 1])
    assert "--reference DIR is needed; eval/reference.py makes it" in refused(fid.main, without)
    monkeypatch.setattr(Sampler, "draw", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fid.main(line)
    with pytest.raises(ZeroDivisionError):  # not refused for its settings
        fid.main([*line, "--steps", "3"])


@pytest.mark.slow
def test_an_incomplete_set_of_an_earlier_command_is_left_out(run: Run, out: Path) -> None:
    next(out.glob("sets/atc*/0001_1.png")).unlink()
    assert [row["method"] for row in run("--method none")] == ["unmerged", "ToDo", "tomesd"]


@pytest.mark.slow
def test_more_methods_are_timed_again_in_turn_with_the_others(run: Run, out: Path) -> None:
    """Rounds that lack a method count no more."""
    rows = run("--method tome --time 1")
    rounds = json.loads((out / "times.json").read_text())
    assert [len(each) for each in rounds] == [4, 4, 5]
    assert {float(row["seconds"]) for row in rows} == set(rounds[2].values())


def test_a_log_has_the_estimate_at_once(sampling: Sampling, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", TextIOWrapper(log := BytesIO()))
    images, sampler = plan(["ant"], [0], 2, "{}", 0), Sampler(replace(sampling, batch_size=1), PartialState(cpu=True))
    sampler.draw_missing(make_sets(tmp_path, [Method()], images, {}), {Method(): images})
    assert b"hours for the other 1 image." in log.getvalue()


def test_merging_changes_images_and_is_undone_for_the_next_set(sampling: Sampling) -> None:
    images, atc, tome = plan(["ant"], [0], 4, "{}", 0), Method(ATCConfig.paper(0.5)), Method(ToMeConfig(r=0.5))
    merged = draw(sampling, images, tome, atc)
    assert np.array_equal(merged, draw(sampling, images, atc))
    assert not np.array_equal(merged, draw(sampling, images, atc, tome))
    assert np.array_equal(draw(sampling, images, atc, Method()), draw(sampling, images))


def test_an_image_does_not_depend_on_its_neighbours_or_their_order(sampling: Sampling) -> None:
    images = plan(["ant", "bee"], [0, 1], 2, "{}", 0)
    together = draw(sampling, images)
    assert np.array_equal(together, draw(sampling, images[::-1])[::-1])
    assert np.array_equal(together, [draw(sampling, [image])[0] for image in images])


def test_another_batch_size_changes_no_more_than_rounding(sampling: Sampling) -> None:
    """The noise is the same; sums of products differ in their last bits, and a value at .5 can round either way."""
    images = plan(["ant", "bee"], [0, 1], 2, "{}", 0)
    single = replace(sampling, batch_size=1)
    for one, four in zip([draw(single, [each])[0] for each in images], draw(sampling, images), strict=True):
        assert np.abs(one.astype(int) - four.astype(int)).max() <= 1


def start(command: list[str]) -> "subprocess.Popen[str]":
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def finish(processes: "list[subprocess.Popen[str]]") -> list[str]:
    said = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), said
    return said


@pytest.mark.slow
def test_two_machines_share_the_images_and_resume_what_was_killed(
    options: list[str], whole: Path, tmp_path: Path
) -> None:
    """By the recipe of the help, with one process on each machine, both of which are this one, without GPUs."""
    out = tmp_path / "out"
    process = start([sys.executable, str(ROOT / "eval" / "fid.py"), *options, *METHODS.split(), "--out", str(out)])
    wait_for(lambda: len(images_in(out)) >= 3)
    process.kill()
    process.wait()
    assert 3 <= len(images_in(out)) < 24
    said = finish(launch([*options, *METHODS.split(), "--out", str(out)]))
    assert images_in(out) == images_in(whole)
    assert sorted(path.name for path in out.glob("sets/atc*/record-*")) == ["record-0.json", "record-1.json"]
    assert "drawing, process 1 of 2" in said[0]
    assert "".join(said).count("wrote") == 1


def launch(options: list[str]) -> "list[subprocess.Popen[str]]":
    """The help's command on each of two machines."""
    lines = map(str.strip, fid.__doc__.replace("\\\n", "").splitlines())
    [recipe] = [line.partition("eval/fid.py")[0] for line in lines if "--machine_rank" in line]
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    here = {"$FIRST": "127.0.0.1", "16": "2", "29500": str(port)}
    words = [here.get(word, word) for word in recipe.removeprefix("accelerate launch").split()]
    line = [sys.executable, "-m", "accelerate.commands.launch", *words, str(ROOT / "eval" / "fid.py"), *options]
    return [start([rank if word == "$RANK" else word for word in line]) for rank in "01"]


def wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.01)


@pytest.mark.slow
def test_jobs_draw_their_parts_and_a_last_one_scores(
    options: list[str], whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, unscored = tmp_path / "out", [each for each in options if "reference" not in each]
    line = [*unscored, *METHODS.split(), "--out", str(out)]
    command = [sys.executable, str(ROOT / "eval" / "fid.py"), *line, "--part"]
    assert "python eval/fid.py --part $SLURM_ARRAY_TASK_ID/8" in fid.__doc__
    said = finish([start([*command, part]) for part in ("1/2", "2/2")])
    assert [re.findall(r"part ./2 is drawn", each) for each in said] == [["part 1/2 is drawn"], ["part 2/2 is drawn"]]
    assert images_in(out) == images_in(whole)
    assert len(list(out.glob("sets/unmerged/record-*.json"))) == 2
    assert not (out / "report.md").exists()
    monkeypatch.setattr(Sampler, "draw", lambda *_: pytest.fail("drawn again"))
    fid.main([*options, *METHODS.split(), "--out", str(out)])
    assert "24 images, of which 24 are drawn already" in capsys.readouterr().out
    assert (out / "report.md").exists()


def test_the_list_names_every_image_and_the_plan_and_draws_nothing(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fid.main([*options, "--list", "--classes", "2,0", "--seed", "5", "--out", str(tmp_path / "out")])
    assert capsys.readouterr().out.splitlines() == [
        "class\timage\tseed\tfile\tprompt",
        "2\t0\t25\t0002_0.png\tcat",
        "2\t1\t26\t0002_1.png\tcat",
        "0\t0\t5\t0000_0.png\tant",
        "0\t1\t6\t0000_1.png\tant",
        "5 sets of 4 images, 2 steps each: 20 images, of which 0 are drawn already. The first batch tells how long the "
        "others will take.",
    ]
    assert not (tmp_path / "out").exists()


def test_by_default_it_is_the_papers_experiment(capsys: pytest.CaptureFixture[str]) -> None:
    fid.main(["--list"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2002
    assert lines[1] == "0\t0\t0\t0000_0.png\tA high quality photograph of a tench, Tinca tinca."
    assert lines[2000].startswith("999\t1\t9991\t0999_1.png\tA high quality photograph of a toilet tissue")
    assert lines[2001].startswith("25 sets of 2000 images, 50 steps each: 50000 images, of which 0 are drawn already.")


@pytest.mark.skipif(PartialState().device.type != "cpu", reason="has a GPU")
def test_without_a_gpu_months_of_drawing_are_refused_unless_asked_for(
    refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = f"--keep 40 50 60 --method paper --out {tmp_path / 'out'}".split()
    assert re.search(
        "PyTorch finds no GPU here, .* each of these 8000 images; .* --device cpu", refused(fid.main, line)
    )
    assert not (tmp_path / "out").exists()
    assert "--reference DIR is needed" in refused(fid.main, [*line, "--device", "cpu"])
    assert "--reference DIR is needed" in refused(fid.main, [*line, "--classes", "10"])
