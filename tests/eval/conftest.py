"""A tiny Stable Diffusion in a folder and images to score."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.helpers import tiny_pipelines


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a pipeline of Stable Diffusion 1.x's kind."""
    folder: Path = tmp_path_factory.mktemp("model") / "tiny"
    tiny_pipelines.sd15().save_pretrained(folder)
    return folder


@pytest.fixture
def draw_images(tmp_path: Path) -> Callable[..., Path]:
    """Makes a folder of `count` random images, by its name."""
    return lambda name, count, size=16: random_images(tmp_path / name, count, size)


def random_images(folder: Path, count: int, size: int = 16) -> Path:
    folder.mkdir()
    for number in range(count):
        pixels = np.random.default_rng(number).integers(256, size=(size, size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder
