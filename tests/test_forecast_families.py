"""Forecasts in every family, with timesteps as its pipelines give them."""

from typing import Any

import pytest
import torch
from torch import Tensor

from atc_diffusion import apply_patch
from tests.families import FAMILIES
from tests.test_forecast import FORECAST, SKIPPED, STEPS, forecast_steps

DENOISERS = [name for name in FAMILIES if "controlnet" not in name or name == "controlnet_xs"]
NUM_TOKENS = 24  # of packed latents; those of a reference picture follow
RESIDUALS = {  # what a ControlNet returns, by the names under which its network takes it
    "sd3": ["block_controlnet_hidden_states"],
    "flux": ["controlnet_block_samples", "controlnet_single_block_samples"],
}


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


@pytest.mark.parametrize("name", DENOISERS)
def test_every_family_is_forecast(name):
    network = apply_patch(FAMILIES[name].make(), FORECAST)
    denoise(name, network)
    assert forecast_steps(network) == SKIPPED


@pytest.mark.parametrize("name", DENOISERS)
def test_no_family_is_forecast_where_noise_is_added(name):
    network = FAMILIES[name].make()
    expected = denoise(name, network, noise=0.1)
    apply_patch(network, FORECAST)
    actual = denoise(name, network, noise=0.1)
    assert all(torch.equal(*pair) for pair in zip(actual, expected, strict=True))
    assert not forecast_steps(network)


@pytest.mark.parametrize("name", ["flux", "qwen_image", "z_image"])
def test_few_steps_whose_number_is_unknown_are_computed(name):
    network = apply_patch(FAMILIES[name].make(), FORECAST)
    denoise(name, network, steps=4)
    assert not forecast_steps(network)
