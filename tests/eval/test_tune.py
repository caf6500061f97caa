"""The command around `tune`, on a tiny model."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tune import main


@pytest.fixture
def options(model: Path) -> list[str]:
    return f"--model {model} --prompt ant --steps 2 --device cpu --max-seconds 0".split()


def test_it_prints_what_to_use_and_writes_both_files(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([*options, "--min-psnr", "10", "--json", str(tmp_path / "t.json"), "--html", str(tmp_path / "t.html")])
    assert "r_keys=0.125" in capsys.readouterr().out
    rows = json.loads((tmp_path / "t.json").read_text())["results"]
    assert [row["ratio"] for row in rows if row["psnr"] is None] == [1.0]
    assert {row["num_inference_steps"] for row in rows} == {2}
    page = (tmp_path / "t.html").read_text()
    assert page.count("<img ") == len(rows) == 2
    assert "<svg" in page


def test_it_tunes_image_to_image(options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.fromarray(np.zeros((40, 48, 3), np.uint8)).save(tmp_path / "sketch.png")
    main([*options, "--image", str(tmp_path / "sketch.png"), "--size", "32", "--batch-size", "2"])
    assert "2 steps" in capsys.readouterr().out
