"""Denoising loops of a tiny UNet, and what was clustered in them."""

from typing import Any

import torch
from torch import Tensor

from atc_diffusion import merge_maps, summary

LAYERS = 3
MOVES = [0.0, 0.04, 0.08, 0.12, 0.16, 0.2]  # in six steps


def counts(model: Any) -> list[int]:
    return [layer.clusterings for layer in summary(model).layers]


def labels(unet: Any) -> list[Tensor]:
    """Of the queries, by step and layer."""
    return [merge.queries.labels for merge in merge_maps(unet) if merge.queries is not None]


def embedding(items: int = 1) -> Tensor:
    return torch.randn(items, 5, 12, generator=torch.Generator().manual_seed(1))


def sample(items: int = 1, size: int = 8) -> Tensor:
    return torch.randn(items, 4, size, 8, generator=torch.Generator().manual_seed(items))


def timesteps(*values: int) -> Tensor:
    return torch.tensor(values)


@torch.no_grad()
def run(unet: Any, steps: Tensor, text: Tensor, latents: Tensor | None = None) -> Tensor:
    """A denoising loop; returns its last output."""
    latents = sample(len(text)) if latents is None else latents
    for timestep in steps:
        latents = unet(latents, timestep, text).sample
    return latents


@torch.no_grad()
def drift(unet: Any, moves: list[float], steps: Tensor, latents: Tensor, text: Tensor) -> list[Tensor]:
    """Outputs for latents that move away from where they were, by shares of their norm."""
    return [unet((1 + move) * latents, t, text).sample for move, t in zip(moves, steps, strict=True)]
