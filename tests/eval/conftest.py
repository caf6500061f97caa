"""A tiny Stable Diffusion in a folder, and pictures to score."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

SPECIAL = ["<|startoftext|>", "<|endoftext|>"]


@pytest.fixture
def model(tmp_path: Path, components: dict[str, Any]) -> Path:
    """A folder with a pipeline of Stable Diffusion 1.x's kind that draws 16 x 16 pictures."""
    letters = [letter + end for letter in "abcdefghijklmnopqrstuvwxyz" for end in ("", "</w>")]
    vocabulary = {word: number for number, word in enumerate([*letters, *SPECIAL])}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=8)
    config = CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=12,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=8,
        bos_token_id=len(vocabulary) - 2,
        eos_token_id=len(vocabulary) - 1,
    )
    parts = components | {"tokenizer": tokenizer, "text_encoder": CLIPTextModel(config)}
    pipe = StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    pipe.save_pretrained(tmp_path / "model")
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


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """As accelerate gives each of several processes: sums are rounded differently by other numbers of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
