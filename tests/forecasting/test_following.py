"""ControlNets: skipped where their network is forecast, computed everywhere else."""

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel, MultiControlNetModel, StableDiffusionControlNetPipeline
from torch import Tensor

from atc_diffusion import apply_patch
from tests.helpers.drawing import PARTS
from tests.helpers.families import FAMILIES
from tests.helpers.forecasting import (
    FORECAST,
    RESIDUALS,
    SKIPPED,
    STEPS,
    Calls,
    Counted,
    denoise,
    draw,
    forecast_steps,
)

IMAGE = torch.linspace(0, 1, 3 * 16 * 16).reshape(1, 3, 16, 16)


def controlled(components: dict[str, Any], count: int = 1) -> tuple[Any, Calls]:
    """A pipeline with ControlNets, and the list to which each adds 1 when it runs."""
    parts, calls = copy.deepcopy(components), Calls()
    nets = [ControlNetModel.from_unet(parts["unet"], conditioning_embedding_out_channels=(4, 4)) for _ in range(count)]
    for net in nets:
        for block in net.controlnet_down_blocks:
            torch.nn.init.normal_(block.weight)
        net.conv_in = Counted(net.conv_in, calls)
    controlnet = nets[0] if count == 1 else MultiControlNetModel(nets)
    return StableDiffusionControlNetPipeline(**parts, controlnet=controlnet, **PARTS), calls


@pytest.mark.parametrize("count", [1, 2])
def test_controlnets_are_skipped_with_the_network(components, count):
    pipe, calls = controlled(components, count)
    image = IMAGE if count == 1 else [IMAGE] * count
    apply_patch(pipe, FORECAST)
    images = []
    for drawn in (pipe, copy.deepcopy(pipe)):
        images.append(draw(drawn, image=image))
        assert forecast_steps(drawn) == SKIPPED
    assert torch.equal(*images)
    assert len(calls) == 2 * count * (STEPS - len(SKIPPED))


def test_a_controlnet_is_computed_where_it_gets_another_image(components):
    pipe, calls = controlled(components)
    apply_patch(pipe, FORECAST)

    def change(pipe: Any, step: int, timestep: Tensor, values: dict[str, Tensor]) -> dict[str, Tensor]:
        values["image"].copy_(torch.rand_like(values["image"]))
        return {}

    draw(pipe, image=IMAGE, callback_on_step_end=change, callback_on_step_end_tensor_inputs=["latents", "image"])
    assert forecast_steps(pipe) == SKIPPED
    assert len(calls) == STEPS


def test_a_controlnet_without_its_pipeline_is_computed(components):
    pipe, calls = controlled(components)
    apply_patch(pipe.unet, FORECAST)
    apply_patch(pipe.controlnet, FORECAST)
    draw(pipe, image=IMAGE)
    assert forecast_steps(pipe) == SKIPPED
    assert len(calls) == STEPS


@pytest.mark.parametrize("name", RESIDUALS)
def test_controlnets_of_transformers_are_skipped(name):
    network, controlnet = FAMILIES[name].make(), FAMILIES[f"{name}_controlnet"].make()
    both: Any = SimpleNamespace(transformer=network, controlnet=controlnet)
    calls = Calls()
    apply_patch(network, FORECAST)
    expected = denoise(name, network, controlnet)
    embedder = "x_embedder" if hasattr(controlnet, "x_embedder") else "pos_embed"
    setattr(controlnet, embedder, Counted(getattr(controlnet, embedder), calls))
    apply_patch(both, FORECAST)
    assert torch.equal(denoise(name, network, controlnet), expected)
    assert forecast_steps(both) == SKIPPED
    assert len(calls) == STEPS - len(SKIPPED)
