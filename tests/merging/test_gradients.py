"""Gradients through clusters: checkpoints, and training after inference."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from atc_diffusion import ATCConfig, ToMeConfig, apply_patch
from tests.helpers.loops import embedding, sample, timesteps


def gradient(unet: Any, checkpointing: bool, config: ATCConfig | ToMeConfig) -> Tensor:
    """The gradient of two unrolled steps with respect to all parameters."""
    unet = copy.deepcopy(unet).train().requires_grad_(True)
    if checkpointing:
        unet.enable_gradient_checkpointing()
    apply_patch(unet, config)
    latents, loss = sample(2), torch.zeros(())
    for timestep in timesteps(900, 700):
        latents = unet(latents, timestep, embedding(2)).sample
        loss = loss + latents.square().mean()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in unet.parameters() if p.grad is not None])


@pytest.mark.parametrize(
    "config",
    [
        ATCConfig(r=0.5),
        ATCConfig(r=0.5, recluster_threshold=0, features="hidden_states"),
        ATCConfig(r=lambda progress: 0.25 + 0.5 * progress),
        ToMeConfig(r=0.5),
    ],
)
def test_a_gradient_checkpoint_recomputes_with_the_clusters_it_had(unet, config):
    assert torch.equal(gradient(unet, True, config), gradient(unet, False, config))


def test_an_inference_run_leaves_nothing_that_training_would_trip_over(unet):
    apply_patch(unet.requires_grad_(True), recluster_threshold=0.3)
    steps = timesteps(900, 700)
    with torch.inference_mode():
        unet(sample(), steps[0], embedding())
    unet(sample(), steps[1], embedding()).sample.sum().backward()
