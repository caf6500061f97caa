"""Diffusers' modular pipelines, which call the network once for each condition, and their guiders."""

from typing import Any

import pytest
import torch
from diffusers import (
    AutoGuidance,
    ClassifierFreeGuidance,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LayerSkipConfig,
    PerturbedAttentionGuidance,
    SequentialPipelineBlocks,
    SkipLayerGuidance,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
)
from diffusers.modular_pipelines.flux.modular_blocks_flux import FluxCoreDenoiseStep
from diffusers.modular_pipelines.stable_diffusion_3.modular_blocks_stable_diffusion_3 import (
    StableDiffusion3T2ICoreDenoiseStep,
)
from diffusers.modular_pipelines.stable_diffusion_xl.before_denoise import (
    StableDiffusionXLInputStep,
    StableDiffusionXLPrepareAdditionalConditioningStep,
    StableDiffusionXLPrepareLatentsStep,
    StableDiffusionXLSetTimestepsStep,
)
from diffusers.modular_pipelines.stable_diffusion_xl.denoise import StableDiffusionXLDenoiseStep
from torch import Tensor

from atc_diffusion import apply_patch, remove_patch, summary
from tests.helpers.families import FAMILIES

FINEST = {"sdxl": "down_blocks.1.attentions.0.transformer_blocks", "sd35": "transformer_blocks"}


def sdxl() -> Any:
    steps = {
        "input": StableDiffusionXLInputStep,
        "timesteps": StableDiffusionXLSetTimestepsStep,
        "latents": StableDiffusionXLPrepareLatentsStep,
        "conditions": StableDiffusionXLPrepareAdditionalConditioningStep,
        "denoise": StableDiffusionXLDenoiseStep,
    }
    pipe = SequentialPipelineBlocks.from_blocks_dict(steps).init_pipeline()
    pipe.update_components(unet=FAMILIES["sdxl"].make(), scheduler=EulerDiscreteScheduler())
    return pipe


def sd35() -> Any:
    pipe = StableDiffusion3T2ICoreDenoiseStep().init_pipeline()
    pipe.update_components(transformer=FAMILIES["sd35"].make(), scheduler=FlowMatchEulerDiscreteScheduler())
    return pipe


def flux() -> Any:
    """Its prompts are guided within the network, by one call."""
    pipe = FluxCoreDenoiseStep().init_pipeline()
    pipe.update_components(transformer=FAMILIES["flux"].make(), scheduler=FlowMatchEulerDiscreteScheduler())
    return pipe


MODULAR = {"sdxl": sdxl, "sd35": sd35, "flux": flux}


def batched_sdxl(pipe: Any) -> Any:
    texts = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    parts = {"unet": pipe.unet, "scheduler": pipe.scheduler, "add_watermarker": False}
    return StableDiffusionXLPipeline(vae=None, **texts, **parts)


def batched_sd35(pipe: Any) -> Any:
    names = ("text_encoder", "tokenizer")
    texts = dict.fromkeys(f"{name}{number}" for name in names for number in ("", "_2", "_3"))
    return StableDiffusion3Pipeline(vae=None, **texts, transformer=pipe.transformer, scheduler=pipe.scheduler)


BATCHED = {"sdxl": batched_sdxl, "sd35": batched_sd35}


def options(name: str) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    texts = ("prompt_embeds",) if name == "flux" else ("prompt_embeds", "negative_prompt_embeds")
    embeds = {key: torch.randn(1, 5, 12, generator=generator) for key in texts}
    pooled = {key.replace("prompt", "pooled_prompt"): torch.randn(1, 10, generator=generator) for key in texts}
    size = {"height": 64, "width": 96, "num_inference_steps": 4}
    return embeds | pooled | size


def draw(name: str, pipe: Any) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    return pipe(**options(name), generator=seeded(), output="latents")


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(1)


@pytest.mark.parametrize("name", MODULAR)
def test_identity_and_removal_are_exact(name):
    pipe = MODULAR[name]()
    before = draw(name, pipe)
    assert torch.equal(draw(name, apply_patch(pipe, r=1, r_keys=1)), before)
    merged = draw(name, apply_patch(pipe, r=1, r_keys=0.25))
    assert not torch.allclose(merged, before, atol=1e-4)
    assert {layer.kept_keys for layer in summary(pipe).layers} == {(6,) * 4}
    assert torch.equal(draw(name, remove_patch(pipe)), before)


@pytest.mark.parametrize("features", ["keys", "hidden_states"])
@pytest.mark.parametrize("name", BATCHED)
def test_a_call_for_each_condition_is_as_one_call_for_all(name, features):
    """Where no clusters are shared."""
    pipe = MODULAR[name]()
    apply_patch(pipe, r=0.5, features=features, share_guidance=False, recluster_threshold=0)
    batched = BATCHED[name](pipe)
    batched.set_progress_bar_config(disable=True)
    guidance = {"guidance_scale": pipe.guider.guidance_scale}
    expected = batched(**options(name), **guidance, generator=seeded(), output_type="latent").images
    assert {layer.kept for layer in summary(batched).layers} == {(12,) * 4}
    assert (draw(name, pipe) - expected).norm() < 1e-5 * expected.norm()  # the rounding of float32


def guiders(where: str) -> dict[str, Any]:
    """Each with what it perturbs in the first block, in all steps."""
    scores = LayerSkipConfig(indices=[0], fqn=where, skip_attention=False, skip_attention_scores=True, skip_ff=False)
    block = LayerSkipConfig(indices=[0], fqn=where)
    attention = LayerSkipConfig(indices=[0], fqn=where, skip_ff=False)
    mlp = LayerSkipConfig(indices=[0], fqn=where, skip_attention=False)
    always = {"start": 0.0, "stop": 1.0}
    perturbed = {f"perturbed_guidance_{name}": value for name, value in always.items()}
    skipped = {f"skip_layer_guidance_{name}": value for name, value in always.items()}
    return {
        "perturbed": PerturbedAttentionGuidance(perturbed_guidance_config=scores, **perturbed),
        "skip_block": SkipLayerGuidance(skip_layer_config=block, **skipped),
        "skip_attention": SkipLayerGuidance(skip_layer_config=attention, **skipped),
        "skip_mlp": AutoGuidance(auto_guidance_config=mlp),
        "skip_attention_in_another": AutoGuidance(auto_guidance_config=attention),
    }


# For Stable Diffusion 3, diffusers' own hooks cannot perturb attention.
CASES = [*(("sdxl", guider) for guider in guiders("")), ("sd35", "skip_mlp")]


@pytest.mark.parametrize(("name", "guider"), CASES)
def test_what_perturbed_predictions_change_is_kept(name, guider):
    pipe = MODULAR[name]()
    changes = []
    for config in ({"r": 1, "r_keys": 1}, {"r": 1, "r_keys": 0.75}):
        apply_patch(pipe, **config)
        pipe.update_components(guider=ClassifierFreeGuidance())
        plain = draw(name, pipe)
        pipe.update_components(guider=guiders(FINEST[name])[guider])
        changes.append(draw(name, pipe) - plain)
    exact, merged = changes
    assert exact.any()
    assert (merged - exact).norm() < 0.5 * exact.norm()
