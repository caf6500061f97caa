"""The guide's snippets, run as they stand but for the substitutions below: tiny models, few steps, on the CPU."""

import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from atc_diffusion import summary
from tests.conftest import UNET
from tests.families import PIXART, SD3, SDXL

ROOT = Path(__file__).parents[1]
EMOJI = ROOT / "examples" / "emoji_diffusion"
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
TEXT = 128  # width of the text encoder of emoji_diffusion


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Tiny models under the names in `MODELS`, and the pictures that snippets open."""
    folder = tmp_path_factory.mktemp("guide")
    for name in ("sketch.png", "edges.png"):
        Image.linear_gradient("L").resize((128, 128)).convert("RGB").save(folder / name)
    sd15().save_pretrained(folder / "sd15")
    controlnet().save_pretrained(folder / "controlnet")
    sdxl().save_pretrained(folder / "sdxl")
    sd3().save_pretrained(folder / "sd3")
    pixart().save_pretrained(folder / "pixart")
    return folder


def sd15() -> StableDiffusionPipeline:
    unet = UNet2DConditionModel(**UNET | {"sample_size": 16, "cross_attention_dim": TEXT})
    no_checker = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return StableDiffusionPipeline(
        vae(), clip(), tokenizer(), unet, DDIMScheduler(clip_sample=False, steps_offset=1), **no_checker
    )


def controlnet() -> ControlNetModel:
    return ControlNetModel.from_unet(sd15().unet, conditioning_embedding_out_channels=(4, 8, 8, 8))


def sdxl() -> StableDiffusionXLPipeline:
    blocks = {
        "block_out_channels": (16, 32, 32),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 1, 2),
    }
    texts = {"cross_attention_dim": 2 * TEXT, "projection_class_embeddings_input_dim": 6 * 4 + TEXT}
    unet = UNet2DConditionModel(**SDXL | {"sample_size": 16} | blocks | texts)
    texts = {"text_encoder": clip(), "text_encoder_2": projecting_clip(), "tokenizer": tokenizer()}
    return StableDiffusionXLPipeline(
        vae=vae(), unet=unet, scheduler=EulerDiscreteScheduler(), tokenizer_2=tokenizer(), **texts
    )


def sd3() -> StableDiffusion3Pipeline:
    texts = {"joint_attention_dim": 2 * TEXT, "pooled_projection_dim": 2 * TEXT}
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(**SD3 | texts),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae(latent_channels=16),
        text_encoder=projecting_clip(),
        tokenizer=tokenizer(),
        text_encoder_2=projecting_clip(),
        tokenizer_2=tokenizer(),
        text_encoder_3=None,
        tokenizer_3=None,
    )


def pixart() -> PixArtSigmaPipeline:
    t5 = T5Config(vocab_size=256, d_model=12, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    return PixArtSigmaPipeline(
        tokenizer=T5Tokenizer(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁a", -1.0)]),
        text_encoder=T5EncoderModel(t5),
        vae=vae(),
        transformer=PixArtTransformer2DModel(**PIXART | {"sample_size": 32, "out_channels": 8}),
        scheduler=DPMSolverMultistepScheduler(),
    )


def vae(latent_channels: int = 4) -> AutoencoderKL:
    """It makes pictures smaller by 8, as those of all these models do."""
    return AutoencoderKL(
        block_out_channels=(4,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=latent_channels,
        norm_num_groups=2,
        shift_factor=0.0,
    )


def tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(EMOJI / "tokenizer")


def clip() -> CLIPTextModel:
    return CLIPTextModel(CLIPTextConfig.from_pretrained(EMOJI / "text_encoder"))


def projecting_clip() -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(CLIPTextConfig.from_pretrained(EMOJI / "text_encoder"))


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
