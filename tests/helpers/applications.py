"""The denoising loops of applications that build on diffusers, in our own words.

What counts is how each calls the network. They draw one image of `latents` `[1, 4, H, W]` and `text` `[2, N, C]`, the
negative prompt first, with the network and the scheduler of a pipeline.
"""

import copy
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

GUIDANCE = 3.0
RHO = 7.0  # Karras et al. 2022, Eq. 5

Loop = Callable[[Any, Tensor, Tensor, int], Tensor]


def guided(parts: Any) -> Tensor:
    unconditional, conditional = parts
    return unconditional + GUIDANCE * (conditional - unconditional)


def invoke_ai(pipe: Any, latents: Tensor, text: Tensor, steps: int, sequential: bool = False) -> Tensor:
    """A new tensor of timesteps at each step, positional arguments, and the progress among the keywords."""
    pipe.scheduler.set_timesteps(steps)
    for i, t in enumerate(pipe.scheduler.timesteps):
        given = {"cross_attention_kwargs": {"percent_through": i / steps}, "encoder_attention_mask": None}
        x = pipe.scheduler.scale_model_input(latents, t)
        if sequential:
            parts = [pipe.unet(x, torch.cat([t[None]]), each[None], **given).sample for each in text]
        else:
            parts = pipe.unet(torch.cat([x] * 2), torch.cat([t[None]] * 2), text, **given).sample.chunk(2)
        latents = pipe.scheduler.step(guided(parts), t, latents).prev_sample
    return latents


def invoke_ai_in_turn(pipe: Any, latents: Tensor, text: Tensor, steps: int) -> Tensor:
    """Guidance in sequence, which saves memory: one call for each prompt."""
    return invoke_ai(pipe, latents, text, steps, sequential=True)


def multi_diffusion(pipe: Any, latents: Tensor, text: Tensor, steps: int) -> Tensor:
    """Tiles that overlap, each with a copy of the scheduler; a step's latents are the mean of the tiles' own."""
    pipe.scheduler.set_timesteps(steps)
    width = latents.shape[3]
    canvas = torch.cat([latents, latents[..., : width // 2].flip(3)], dim=3)
    tiles = [slice(left, left + width) for left in (0, width // 2)]
    schedulers = [copy.deepcopy(pipe.scheduler) for _ in tiles]
    for t in pipe.scheduler.timesteps:
        sums, counts = torch.zeros_like(canvas), torch.zeros_like(canvas)
        for tile, scheduler in zip(tiles, schedulers, strict=True):
            x = scheduler.scale_model_input(canvas[..., tile], t)
            parts = pipe.unet(torch.cat([x] * 2), torch.cat([t[None]] * 2), text).sample.chunk(2)
            sums[..., tile] += scheduler.step(guided(parts), t, canvas[..., tile]).prev_sample
            counts[..., tile] += 1
        canvas = sums / counts
    return canvas


def k_diffusion(pipe: Any, latents: Tensor, text: Tensor, steps: int, second_order: bool = False) -> Tensor:
    """Euler's or Heun's method over Karras' noise levels: timesteps between those of training."""
    products = pipe.scheduler.alphas_cumprod[:-1]  # the last one is zero where betas are rescaled
    trained = ((1 - products) / products).sqrt()
    first, last = trained[900] ** (1 / RHO), trained[0] ** (1 / RHO)
    sigmas = torch.cat([torch.linspace(first, last, steps) ** RHO, torch.zeros(1)])
    x = latents * sigmas[0]
    for now, later in pairwise(sigmas):
        slope = (x - guided_denoise(pipe.unet, trained, x, now, text)) / now
        if second_order and later > 0:
            ahead = x + slope * (later - now)
            slope = (slope + (ahead - guided_denoise(pipe.unet, trained, ahead, later, text)) / later) / 2
        x = x + slope * (later - now)
    return x


def k_diffusion_heun(pipe: Any, latents: Tensor, text: Tensor, steps: int) -> Tensor:
    """Two calls a step: the second one at the next noise level, where the next step begins with other latents."""
    return k_diffusion(pipe, latents, text, steps, second_order=True)


def guided_denoise(unet: Any, trained: Tensor, x: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
    return guided(denoise(unet, trained, torch.cat([x] * 2), sigma * x.new_ones(2), text).chunk(2))


def denoise(unet: Any, trained: Tensor, x: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
    """The clean image as by k-diffusion's `CompVisVDenoiser`, which finds a timestep for each noise level."""
    log, logs = sigma.log(), trained.log()
    low = (logs <= log[:, None]).sum(dim=1).clamp(1, len(logs) - 1) - 1
    times = low + ((logs[low] - log) / (logs[low] - logs[low + 1])).clamp(0, 1)
    sigma = sigma[:, None, None, None]
    scale = (sigma**2 + 1).sqrt()
    return x / scale**2 - unet(x / scale, times, encoder_hidden_states=text).sample * sigma / scale


def sd_next(pipe: Any, latents: Tensor, text: Tensor, steps: int) -> Tensor:
    """A pipeline whose callback centers latents, and ends guidance at four fifths."""

    def correct(pipe: Any, step: int, timestep: Tensor, values: dict[str, Tensor]) -> dict[str, Tensor]:
        values["latents"] = values["latents"] - 0.02 * values["latents"].mean(dim=(2, 3), keepdim=True)
        if step == int(0.8 * steps) - 1:
            pipe._guidance_scale = 0.0
            values["prompt_embeds"] = values["prompt_embeds"].chunk(2)[-1]
        return values

    height, width = (pipe.vae_scale_factor * size for size in latents.shape[2:])
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        prompt_embeds=text[1:],
        negative_prompt_embeds=text[:1],
        latents=latents,
        height=height,
        width=width,
        num_inference_steps=steps,
        guidance_scale=GUIDANCE,
        output_type="latent",
        callback_on_step_end=correct,
        callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"],
    ).images


def inpainting(pipe: Any, latents: Tensor, text: Tensor, steps: int) -> Tensor:
    """A network of four channels: after each step, what is outside the mask is put back, with the step's noise."""
    pipe.scheduler.set_timesteps(steps)
    original, mask = torch.full_like(latents, 0.5), torch.zeros_like(latents)
    mask[..., : latents.shape[3] // 2] = 1
    noise = latents
    times = pipe.scheduler.timesteps
    for i, t in enumerate(times):
        x = pipe.scheduler.scale_model_input(torch.cat([latents] * 2), t)
        parts = pipe.unet(x, t, encoder_hidden_states=text).sample.chunk(2)
        latents = pipe.scheduler.step(guided(parts), t, latents).prev_sample
        kept = pipe.scheduler.add_noise(original, noise, times[i + 1 : i + 2]) if i + 1 < steps else original
        latents = (1 - mask) * kept + mask * latents
    return latents


def stream_diffusion(pipe: Any, latents: Tensor, text: Tensor, steps: int) -> Tensor:
    """Frames of a video, each at another of four noise levels, in one batch; all calls have the same timesteps."""
    levels = torch.tensor([500, 400, 300, 200])
    products = pipe.scheduler.alphas_cumprod[levels][:, None, None, None]
    noise = latents.repeat(4, 1, 1, 1)
    buffer, frames = noise[:3], []
    for i in range(steps):
        frame = latents.roll(i // 4, dims=3)
        batch = torch.cat([products[:1].sqrt() * frame + (1 - products[:1]).sqrt() * noise[:1], buffer])
        output = pipe.unet(batch, levels, encoder_hidden_states=text[1:].repeat(4, 1, 1), return_dict=False)[0]
        clean = products.sqrt() * batch - (1 - products).sqrt() * output
        buffer = (products[1:].sqrt() * clean[:3]) + (1 - products[1:]).sqrt() * noise[1:]
        frames.append(clean[3:])
    return torch.cat(frames)


_ALL = (
    invoke_ai,
    invoke_ai_in_turn,
    multi_diffusion,
    k_diffusion,
    k_diffusion_heun,
    sd_next,
    inpainting,
    stream_diffusion,
)
LOOPS: dict[str, Loop] = {loop.__name__: loop for loop in _ALL}
