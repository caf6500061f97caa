"""The model that ships here: it loads quietly, and its pictures are there, at its size."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

MODEL = Path(__file__).parents[2] / "examples" / "emoji_diffusion"
THINGS = (MODEL / "things.txt").read_text().splitlines()
LOAD = """
import diffusers, transformers
diffusers.utils.logging.disable_progress_bar()
transformers.logging.disable_progress_bar()
diffusers.StableDiffusionPipeline.from_pretrained({model!r})
"""


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(MODEL, subfolder="vae")


def picture(thing: str) -> Image.Image:
    return Image.open(MODEL / "pictures" / f"{thing.replace(' ', '_')}.webp")


@pytest.mark.slow
def test_the_pipeline_loads_without_a_warning():
    command = [sys.executable, "-c", LOAD.format(model=str(MODEL))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout + done.stderr == ""


def test_the_finest_level_has_4096_tokens():
    assert UNet2DConditionModel.load_config(MODEL, subfolder="unet")["sample_size"] ** 2 == 4096


def test_every_thing_has_its_picture_at_the_models_size(vae):
    assert len(list((MODEL / "pictures").glob("*.webp"))) == len(THINGS)
    assert {picture(thing).size for thing in THINGS} == {(vae.config.sample_size,) * 2}


def test_the_autoencoder_rebuilds_the_pictures(vae):
    pictures = VaeImageProcessor().preprocess([picture(thing) for thing in THINGS[::12]])
    with torch.no_grad():
        rebuilt = vae(pictures).sample.clamp(-1, 1)
    psnr = 10 * torch.log10(4 / (rebuilt - pictures).square().mean())
    assert psnr > 30


def four_steps(pipe: StableDiffusionPipeline, guidance: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    arguments = {"height": 128, "width": 128, "guidance_scale": guidance, "output_type": "latent"}
    return pipe(THINGS[0], num_inference_steps=4, generator=generator, **arguments).images


@pytest.mark.slow
def test_four_steps_of_the_lora_need_no_guidance():
    pipe = StableDiffusionPipeline.from_pretrained(MODEL)
    pipe.set_progress_bar_config(disable=True)
    guided, unguided = four_steps(pipe, 3.0), four_steps(pipe, 1.0)
    pipe.load_lora_weights(MODEL / "four_steps")
    distance = (four_steps(pipe, 1.0) - guided).square().mean()
    assert distance < (unguided - guided).square().mean() / 2
