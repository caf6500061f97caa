"""Distillation of the emoji model, on a tiny pipeline: what the teacher writes down and where the student must land."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from distil import LORA, PHASE, STEPS, append_latents, landing_loss, trajectory
from torch import Tensor
from train import THINGS, tokenize
from training import Training

from tests.helpers.tiny_pipelines import sd15

UNMERGED = replace(PHASE, batch=1, merged=0)


@pytest.fixture
def pipe() -> StableDiffusionPipeline:
    pipe = sd15()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def own_trajectory(pipe: StableDiffusionPipeline) -> Tensor:
    """What the student draws itself, from one noise."""
    points = [torch.randn(1, 4, 16, 16)]
    arguments = {"num_inference_steps": STEPS, "guidance_scale": 1.0, "output_type": "latent"}
    pipe(THINGS[0], latents=points[0], callback_on_step_end=partial(append_latents, points), **arguments)
    return torch.cat(points)


def texts(pipe: StableDiffusionPipeline) -> Tensor:
    return pipe.text_encoder(tokenize(pipe, THINGS))[0].detach()


def test_the_trajectory_leads_from_the_noise_to_the_teachers_picture(pipe):
    points = trajectory(pipe, THINGS[0], seed=3)
    arguments = {"num_inference_steps": 2 * STEPS, "guidance_scale": 3.0, "output_type": "latent"}
    picture = pipe(THINGS[0], generator=torch.Generator().manual_seed(3), **arguments).images
    assert len(points) == STEPS + 1
    torch.testing.assert_close(points[-1:], picture)


def test_a_student_that_lands_on_the_trajectory_has_no_loss(pipe, tmp_path: Path):
    torch.save(own_trajectory(pipe), tmp_path / "0-00.pt")
    assert landing_loss(pipe, texts(pipe), tmp_path, UNMERGED, step=0) < 1e-10


def test_training_moves_the_lora_alone(pipe, tmp_path: Path):
    torch.save(own_trajectory(pipe) + 0.1, tmp_path / "0-00.pt")
    pipe.unet.requires_grad_(False).add_adapter(LORA)
    before = {name: weight.clone() for name, weight in pipe.unet.state_dict().items()}
    phase, work = replace(UNMERGED, steps=2), tmp_path / "work"
    work.mkdir()
    Training({"unet": pipe.unet}, phase, work).run(partial(landing_loss, pipe, texts(pipe), tmp_path, phase))
    moved = {name for name, weight in pipe.unet.state_dict().items() if not torch.equal(weight, before[name])}
    assert moved
    assert all("lora" in name for name in moved)
