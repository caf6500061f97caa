"""Real diffusers classes at tiny size, with random weights."""

import os
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import diffusers
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from hypothesis import settings

from atc_diffusion.adapters.lookup import is_supported
from atc_diffusion.testing import UNET
from tests.helpers.drawing import VAE

Refused = Callable[[Callable[[Sequence[str]], None], Sequence[str]], str]
PAGE = ["examples/test_app.py", "examples/test_clusters.py"]
collect_ignore = [] if find_spec("gradio") else PAGE  # the extra `test` is without it
if not hasattr(diffusers, "SequentialPipelineBlocks"):
    collect_ignore.append("end_to_end/test_modular.py")


def pytest_configure() -> None:
    """One thread, here and in the processes that tests start: pytest-xdist runs a process on every core already.

    Properties are tried on examples that are the same in every run; CI tries more of them.
    """
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    examples = 200 if os.environ.get("CI") else 50
    settings.register_profile("atc_diffusion", max_examples=examples, deadline=None, derandomize=True)
    settings.load_profile("atc_diffusion")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip families that the installed diffusers is too old for."""
    old = [name for name in ("qwen_image", "z_image") if not is_supported(name)]
    for item in items:
        if any(name in item.name for name in old):
            item.add_marker(pytest.mark.skip(reason="diffusers is too old for this family"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def unet() -> UNet2DConditionModel:
    """A UNet in Stable Diffusion 1.x's layout: self-attention at levels 1 and 2, three blocks at the finest."""
    return UNet2DConditionModel(**UNET).eval().requires_grad_(False)


@pytest.fixture
def components(unet: UNet2DConditionModel) -> dict[str, Any]:
    """What a Stable Diffusion pipeline needs beside a prompt's embedding."""
    return {
        "unet": unet,
        "vae": AutoencoderKL(**VAE).eval(),
        "scheduler": DDIMScheduler(clip_sample=False, steps_offset=1),
        "text_encoder": None,
        "tokenizer": None,
    }


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
