"""Forecasting with what else is done to a network: offloaded, cached, compiled, copied, unpatched."""

import copy
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_module
from torch import Tensor

from atc_diffusion import ATCConfig, apply_patch, remove_patch, summary
from tests.helpers.ecosystem import enable_deep_cache, offload_groups, offload_sequentially
from tests.helpers.forecasting import FORECAST, SKIPPED, STEPS, Calls, draw, forecast_steps, pipeline

CPU = torch.device("cpu")


def test_nothing_changes_without_a_tolerance(components):
    pipe = pipeline(components)
    expected = draw(pipe)
    apply_patch(pipe, r=1.0)
    assert torch.equal(draw(pipe), expected)
    assert "forward" not in vars(pipe.unet)
    assert summary(pipe).forecasts is None


def test_a_deep_copy_is_independent(components):
    pipe = apply_patch(pipeline(components), FORECAST)
    expected = draw(pipe)
    twin = pipeline(components | {"unet": copy.deepcopy(pipe.unet)})
    assert torch.equal(draw(twin), expected)
    assert forecast_steps(twin) == SKIPPED
    twin.unet.conv_out.weight.data.zero_()
    assert torch.equal(draw(pipe), expected)
    remove_patch(pipe)
    assert "forward" not in vars(pipe.unet)
    draw(twin)
    assert forecast_steps(twin) == SKIPPED


def test_removal_is_exact(components):
    pipe = pipeline(components)
    before, attributes = draw(pipe), set(vars(pipe.unet))
    apply_patch(apply_patch(pipe, FORECAST), FORECAST)
    assert not torch.equal(draw(pipe), before)
    remove_patch(pipe)
    assert torch.equal(draw(pipe), before)
    assert set(vars(pipe.unet)) == attributes


@pytest.mark.slow
def test_offloading_before_and_after(components):
    unforecast = draw(pipeline(components))
    expected = draw(apply_patch(pipeline(components), FORECAST))
    pipe = remove_patch(pipeline(components))
    offload_sequentially(pipe)
    assert torch.equal(draw(apply_patch(pipe, FORECAST)), expected)
    remove_patch(pipe)
    remove_hook_from_module(pipe.unet, recurse=True)
    apply_patch(pipe, FORECAST)
    cpu_offload(pipe.unet, CPU)
    assert torch.equal(draw(pipe), expected)
    assert forecast_steps(pipe) == SKIPPED
    remove_patch(pipe)
    remove_hook_from_module(pipe.unet, recurse=True)
    assert torch.equal(draw(pipe), unforecast)


def test_group_offloading(components):
    expected = draw(apply_patch(pipeline(components), FORECAST))
    pipe = apply_patch(pipeline(components), FORECAST)
    offload_groups(pipe)
    assert torch.equal(draw(pipe), expected)
    assert forecast_steps(pipe) == SKIPPED


@pytest.mark.parametrize("cache_first", [True, False])
def test_a_cache_that_counts_steps_sees_them_all(components, cache_first):
    pipe = pipeline(components)
    steps = [enable_deep_cache, lambda pipe: apply_patch(pipe, FORECAST)]
    for step in steps if cache_first else reversed(steps):
        step(pipe)
    draw(pipe)
    assert "none of 20 steps forecast: the network's forward was replaced" in str(summary(pipe))


def test_a_cache_that_replaces_the_forward_of_the_class_sees_every_step(components, monkeypatch):
    pipe = pipeline(components)
    kind, forward, calls = type(pipe.unet), type(pipe.unet).forward, Calls()

    def counting(self: Any, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, **options: Any) -> Any:
        calls.append(1)
        return forward(self, sample, timestep, encoder_hidden_states, **options)

    monkeypatch.setattr(kind, "forward", counting)
    apply_patch(pipe, FORECAST)
    draw(pipe)
    assert len(calls) == STEPS
    assert "none of 20 steps forecast: the network's forward was replaced" in str(summary(pipe))


def test_a_hook_on_all_modules_sees_every_step(components):
    pipe = apply_patch(pipeline(components), FORECAST)
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, args, output: None)
    try:
        draw(pipe)
    finally:
        handle.remove()
    assert "none of 20 steps forecast: the hook" in str(summary(pipe))
    draw(pipe)
    assert forecast_steps(pipe) == SKIPPED


def test_clusters_last_through_skipped_steps(components):
    config = ATCConfig(r=1.0, r_keys=0.5, recluster_threshold=1e9, forecast_tolerance=1e9)
    pipe = apply_patch(pipeline(components), config)
    draw(pipe)
    assert forecast_steps(pipe) == SKIPPED
    assert {layer.clusterings for layer in summary(pipe).layers} == {1}


@pytest.mark.slow
def test_compiled_blocks(components):
    pipe = apply_patch(pipeline(components), FORECAST)
    expected = draw(pipe)
    pipe.unet.mid_block.compile(backend="eager")
    torch.testing.assert_close(draw(pipe), expected, rtol=0, atol=1e-5)
    assert forecast_steps(pipe) == SKIPPED


@pytest.mark.slow
def test_a_compiled_network(components):
    pipe = apply_patch(pipeline(components), FORECAST)
    expected = draw(pipe)
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    torch.testing.assert_close(draw(pipe), expected, rtol=0, atol=1e-5)
    assert forecast_steps(pipe) == SKIPPED


@pytest.mark.parametrize("tolerance", [-1, True, "0.1", float("nan")])
def test_a_tolerance_is_a_number(tolerance):
    with pytest.raises(ValueError, match="forecast_tolerance must be a number from 0 up, got"):
        ATCConfig(forecast_tolerance=tolerance)
