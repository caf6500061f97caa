"""Runs in which every step that can be forecast is, and the bundled model with any sampler."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from atc_diffusion import ATCConfig, apply_patch, load_pipeline, summary
from tests.helpers.drawing import PARTS, text
from tests.helpers.families import FAMILIES
from tests.helpers.tiny_pipelines import EMOJI

STEPS = 20
SKIPPED = (2, 4, 5, 7, 8, 10, 11, 13, 14, 16, 17)
FORECAST = ATCConfig(r=1.0, forecast_tolerance=1e9)  # whatever can be forecast
NUM_TOKENS = 24  # of packed latents; those of a reference image follow
RESIDUALS = {  # what a ControlNet returns, by the names under which its network takes it
    "sd3": ["block_controlnet_hidden_states"],
    "flux": ["controlnet_block_samples", "controlnet_single_block_samples"],
}
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "rescale_betas_zero_snr": False}


class Calls(list[int]):
    """One entry for each call; the same list in deep copies of what it counts."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "Calls":
        return self


class Counted(torch.nn.Module):
    """A module that counts its calls; a hook might have to see every step, and would keep all from being forecast."""

    def __init__(self, module: torch.nn.Module, calls: Calls) -> None:
        super().__init__()
        self.module, self.calls = module, calls

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.calls.append(1)
        return self.module(*args, **kwargs)


def draw(pipe: Any, seed: int = 0, steps: int = STEPS, batch: int = 1, **options: Any) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    options = {"height": 16, "width": 16, "output_type": "latent"} | options
    return pipe(**text(batch), num_inference_steps=steps, generator=generator, **options).images


def forecast_steps(pipe: Any) -> tuple[int, ...]:
    forecasts = summary(pipe).forecasts
    assert forecasts is not None
    return forecasts.forecast


@torch.no_grad()
def denoise(name: str, network: Any, controlnet: Any = None, noise: float = 0.0, steps: int = STEPS) -> Any:
    """The latents after some steps of Euler's method, with noise added if asked for."""
    family = FAMILIES[name]
    inputs = family.inputs(8, 12)
    latents = next(key for key in ("sample", "hidden_states", "x") if key in inputs)
    for timestep in torch.linspace(1000, 1000 / steps, steps):
        given = family.timestep(timestep.expand(2))
        if controlnet is not None:
            conditions = FAMILIES[f"{name}_controlnet"].inputs(8, 12) | given | {latents: inputs[latents]}
            given |= zip(RESIDUALS[name], controlnet(**conditions, return_dict=False), strict=True)
        inputs[latents] = after(inputs[latents], network(**inputs | given, return_dict=False)[0], noise)
    return inputs[latents]


def after(latents: Any, output: Any, noise: float) -> Any:
    if isinstance(latents, list):
        return [after(*pair, noise) for pair in zip(latents, output, strict=True)]
    if latents.ndim == 3:
        image, references = latents.tensor_split([NUM_TOKENS], dim=1)
        return torch.cat([image - 0.05 * output[:, :NUM_TOKENS] + noise * draw_like(image), references], dim=1)
    return latents - 0.05 * output[:, : latents.shape[1]] + noise * draw_like(latents)


def draw_like(x: Tensor) -> Tensor:
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(0))


def pipeline(components: dict[str, Any], scheduler: Any = None) -> Any:
    """A tiny pipeline of random weights."""
    parts = components | ({"scheduler": scheduler} if scheduler else {})
    return StableDiffusionPipeline(**parts, **PARTS)


def emoji(scheduler: Any) -> Any:
    """The bundled model with another scheduler of its noise."""
    pipe = load_pipeline(str(EMOJI), torch.float32)
    pipe.scheduler = type(scheduler).from_config(
        dict(pipe.scheduler.config) | scheduler.config | {"prediction_type": "v_prediction"} | BETAS
    )
    return pipe


def draw_emoji(pipe: Any, prompt: str = "red apple", seed: int = 0, **options: Any) -> Tensor:
    options = {"num_inference_steps": 20, "guidance_scale": 3.0, "height": 48, "width": 48} | options
    generator = torch.Generator().manual_seed(seed)
    return pipe(prompt, output_type="latent", generator=generator, **options).images


def fidelity(latents: Tensor, expected: Tensor) -> float:
    """Their relative distance in dB."""
    return float(-20 * torch.log10((latents - expected).norm() / expected.norm()))


def forecast_fidelity(pipe: Any, draw: Callable[[], Tensor]) -> float:
    """Of the latents that are drawn with `ATCConfig.forecast()`, which stays on the pipeline, to those without."""
    expected = draw()
    apply_patch(pipe, ATCConfig.forecast())
    return fidelity(draw(), expected)
