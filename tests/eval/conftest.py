"""A tiny Stable Diffusion in a folder, pictures to score, and commands that are refused in one sentence."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests import tiny_pipelines

Refused = Callable[[Callable[[Sequence[str]], None], Sequence[str]], str]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder with a pipeline of Stable Diffusion 1.x's kind."""
    tiny_pipelines.sd15().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def draw_pictures(tmp_path: Path) -> Callable[..., Path]:
    """Makes a folder of `count` random pictures."""

    def draw(name: str, count: int, size: int = 16) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        for number in range(count):
            pixels = np.random.default_rng(number).integers(256, size=(size, size, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png")
        return folder

    return draw


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Refused:
    """The sentence with which a command refuses its arguments, offline."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def refused(main: Callable[[Sequence[str]], None], arguments: Sequence[str]) -> str:
        with pytest.raises(SystemExit) as error:
            main(arguments)
        if error.value.code == 2:  # argparse prints the sentence itself, after the usage
            return capsys.readouterr().err.splitlines()[-1]
        assert "\n" not in str(error.value)
        return str(error.value)

    return refused


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """As accelerate gives each of several processes: sums are rounded differently by other numbers of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
