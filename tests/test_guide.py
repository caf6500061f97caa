"""The guide's snippets, run as they stand but for the substitutions below: tiny models, few steps, on the CPU."""

import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from atc_diffusion import summary
from tests import tiny_pipelines

ROOT = Path(__file__).parents[1]
SNIPPETS = dict(re.findall(r"^## (.+?)\n+```python\n(.*?)```", (ROOT / "examples/README.md").read_text(), re.M | re.S))

MODELS = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "sd15",
    "lllyasviel/control_v11p_sd15_canny": "controlnet",
    "stabilityai/stable-diffusion-xl-base-1.0": "sdxl",
    "stabilityai/stable-diffusion-3.5-medium": "sd3",
    "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS": "pixart",
}
SUBSTITUTIONS = {
    r"torch\.b?float16": "torch.float32",
    r'"cuda"': '"cpu"',
    r"num_inference_steps=\d+": "num_inference_steps=4",
    r"fullgraph=True": 'fullgraph=True, backend="eager"',
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Tiny models under the names in `MODELS`, and the pictures that snippets open."""
    folder = tmp_path_factory.mktemp("guide")
    for name in ("sketch.png", "edges.png"):
        Image.linear_gradient("L").resize((128, 128)).convert("RGB").save(folder / name)
    for name in MODELS.values():
        getattr(tiny_pipelines, name)().save_pretrained(folder / name)
    return folder


@pytest.fixture
def run(folder, monkeypatch) -> Iterator[Any]:
    """Runs the snippet under a heading and gives its variables."""
    monkeypatch.chdir(folder)

    def run(heading: str) -> dict[str, Any]:
        variables: dict[str, Any] = {"__name__": "snippet"}
        with warnings.catch_warnings():
            warnings.filterwarnings("error", module=r"atc_diffusion|snippet")
            exec(compile(shrink(SNIPPETS[heading]), heading, "exec"), variables)
        return variables

    yield run
    torch.compiler.reset()


def shrink(snippet: str) -> str:
    for model, name in MODELS.items():
        snippet = snippet.replace(f'"{model}"', f'"./{name}"')
    for pattern, small in SUBSTITUTIONS.items():
        snippet = re.sub(pattern, small, snippet)
    return snippet


LOOK = "Look at what was merged"


@pytest.mark.parametrize("heading", [heading for heading in SNIPPETS if heading != LOOK])
def test_the_snippet_draws_a_merged_picture(run, heading):
    variables = run(heading)
    images = variables.get("images") or [variables["image"]]
    assert all(isinstance(image, Image.Image) for image in images)
    assert summary(variables["pipe"]).work_saved > 0


def test_every_snippet_is_found():
    assert len(SNIPPETS) == (ROOT / "examples/README.md").read_text().count("```python")


def test_both_networks_of_a_controlnet_pipeline_are_merged(run):
    assert {layer.network for layer in summary(run("ControlNet")["pipe"]).layers} == {"unet", "controlnet"}


def test_sdxl_is_merged_at_both_levels(run):
    assert {layer.level for layer in summary(run("SDXL")["pipe"]).layers} == {2, 4}


def test_the_share_changes_over_the_steps(run):
    kept = summary(run("A share that changes over the steps")["pipe"]).layers[0].kept_keys
    assert kept == (13, 26, 38, 51)  # of 256 tokens, from 5 % to 20 %


def test_what_was_merged_can_be_looked_at(run, capsys):
    variables = run(LOOK)
    assert "saved, clustering not counted" in capsys.readouterr().out
    assert variables["clusters"].shape == (16, 16)
    assert variables["clusters"].unique().numel() == 26
    with pytest.raises(ValueError, match="is not patched"):
        summary(variables["pipe"])
