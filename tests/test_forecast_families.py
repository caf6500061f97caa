"""Forecasts in every family, with timesteps as its pipelines give them."""

import pytest
import torch

from atc_diffusion import apply_patch
from tests.helpers.families import FAMILIES
from tests.helpers.forecasting import FORECAST, SKIPPED, denoise, forecast_steps

DENOISERS = [name for name in FAMILIES if "controlnet" not in name or name == "controlnet_xs"]


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
