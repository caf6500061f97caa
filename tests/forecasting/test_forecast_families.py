"""Forecasts in every family, with timesteps as its pipelines give them."""

import pytest

from atc_diffusion import apply_patch
from tests.helpers.families import FAMILIES
from tests.helpers.forecasting import FORECAST, SKIPPED, denoise, forecast_steps

DENOISERS = [name for name in FAMILIES if "controlnet" not in name or name == "controlnet_xs"]


@pytest.mark.parametrize("name", DENOISERS)
def test_every_family_is_forecast(name):
    network = apply_patch(FAMILIES[name].make(), FORECAST)
    denoise(name, network)
    assert len(forecast_steps(network)) >= len(SKIPPED) - 2


@pytest.mark.parametrize("name", ["flux", "qwen_image", "z_image"])
def test_few_steps_whose_number_is_unknown_are_computed(name):
    network = apply_patch(FAMILIES[name].make(), FORECAST)
    denoise(name, network, steps=4)
    assert not forecast_steps(network)
