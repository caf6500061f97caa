"""Where a sampler made the latents of a step, and where inpainting put a noised image back instead."""

import torch
from torch import Tensor

LEAST = 0.05  # of the latents, to be put back, or not to be
MOST_LEFT = 0.1  # of their mean square by the two steps before, or they are of something else
ROUNDING = 1e-11  # of that square: what rounding in three steps leaves
ROUNDING_HALF = 1e-5  # in half precision
TRIALS = 12  # after which a quarter to that power of the first remainder tells what fits


def where_sampled(latents: Tensor, is_half: bool) -> Tensor | None:
    """`[M, C, ...]`: False where an application put noised latents of an image back, as inpainting does, else True.

    Those are a mixture of one image and one noise at each step, and so any of three in a row is a sum of the others.
    None if there are no such latents. The mask lies where `precise` computes.

    Args:
        latents: of three steps, `[3, M, C, ...]`.
        is_half: whether they were rounded to half precision.
    """
    flat = precise(latents.flatten(1))
    size = flat[-1].square().mean()
    first = remainder = _remainder(flat, torch.ones_like(flat[0]))
    for scale in first.mean().clamp(min=1e-20) / 4.0 ** torch.arange(TRIALS, device=flat.device):
        remainder = _remainder(flat, scale / (remainder + scale))  # values that fit count more and more, others less
    put_back = remainder < (ROUNDING_HALF if is_half else ROUNDING) * size
    fraction, left = torch.stack([put_back.to(size).mean(), first.mean() / size]).tolist()
    is_some = LEAST < fraction < 1 - LEAST and left < MOST_LEFT
    return (~put_back).reshape(latents.shape[1:]) if is_some else None


def _remainder(x: Tensor, weights: Tensor) -> Tensor:
    """The squares `[D]` of what least squares with `weights` `[D]` leave of the last of `x` `[3, D]`, on its device."""
    products = (x * weights) @ x.mT
    a, b, c, d, e = products[0, 0], products[0, 1], products[1, 1], products[0, 2], products[1, 2]
    first, second = c * d - b * e, a * e - b * d
    return (x[2] - (first * x[0] + second * x[1]) / (a * c - b * b)).square()


def precise(x: Tensor) -> Tensor:
    """Float64; on the CPU where the device has none, as Macs' GPUs."""
    return (x.cpu() if x.device.type == "mps" else x).double()
