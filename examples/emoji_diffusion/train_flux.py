"""Train a small transformer of Flux's kind on twelve emoji, to measure how merging changes what it draws.

    python examples/emoji_diffusion/train_flux.py --work work --output flux

Autoencoder and text encoder are the emoji model's. A token is two by two latents, as in Flux, so a picture of 256 by
256 pixels has 1024 tokens. Rerun the command to resume. It takes one to two hours on one CPU core.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel, StableDiffusionPipeline
from torch import Tensor
from train import HERE, draw_batch, encode, load_pictures, tokenize
from train import THINGS as ALL_THINGS
from training import Phase, Training

THINGS = ALL_THINGS[::6]
LATENTS, PATCH = 4, 2  # channels of the autoencoder, and latents on a side of a token
COARSE = Phase("flux-coarse", pixels=128, batch=8, steps=3200, rate=2e-3)
FINE = Phase("flux-fine", pixels=256, batch=4, steps=320, rate=7e-4)
FINEST = FINE.pixels // 8  # tokens on a side


def make_transformer() -> FluxTransformer2DModel:
    """Build two joint and four single blocks of width 192: 5.1 million parameters."""
    return FluxTransformer2DModel(
        in_channels=LATENTS * PATCH**2,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=32,
        num_attention_heads=6,
        joint_attention_dim=128,
        pooled_projection_dim=128,
        axes_dims_rope=(4, 14, 14),
    )


def pack(latents: Tensor) -> Tensor:
    """Latents [B, 4, H, W] as tokens [B, H/2 * W/2, 16]."""
    return F.pixel_unshuffle(latents, PATCH).flatten(2).mT


def positions(side: int) -> Tensor:
    """Positions [N, 3] of a square of tokens, which covers the same ground whatever its `side`."""
    place = torch.arange(side) * FINEST / side
    return torch.cartesian_prod(torch.zeros(1), place, place)


def describe(pipe: Any, prompts: list[str]) -> tuple[Tensor, Tensor]:
    """Embeddings [N, L, 128] of the prompts, and [N, 128] of each as a whole."""
    with torch.no_grad():
        output = pipe.text_encoder(tokenize(pipe, prompts))
    return output.last_hidden_state, output.pooler_output


def flow_loss(model: Any, tokens: Tensor, texts: tuple[Tensor, Tensor], phase: Phase, _step: int) -> Tensor:
    """The squared error of the velocity from picture to noise, for a batch of `tokens` [N, T, 16].

    A tenth of the captions are empty; the empty one is the last of `texts`.
    """
    things, captions, sigmas = draw_batch(len(tokens), phase.batch)
    clean = tokens[things]
    noise = torch.randn_like(clean)
    words, pooled = (text[captions] for text in texts)
    velocity = model(
        clean + sigmas[:, None, None] * (noise - clean),
        encoder_hidden_states=words,
        pooled_projections=pooled,
        timestep=sigmas,
        img_ids=positions(int(clean.shape[1] ** 0.5)),
        txt_ids=torch.zeros(words.shape[1], 3),
    ).sample
    return F.mse_loss(velocity, noise - clean)


def train(work: Path) -> FluxTransformer2DModel:
    base, model = StableDiffusionPipeline.from_pretrained(HERE), make_transformer()
    texts = describe(base, [*THINGS, ""])
    paths = [HERE / "pictures" / f"{thing.replace(' ', '_')}.webp" for thing in THINGS]
    for phase in (COARSE, FINE):
        tokens = pack(encode(base.vae, load_pictures(paths, phase.pixels)))
        Training({"transformer": model}, phase, work).run(partial(flow_loss, model, tokens, texts, phase))
    return model


def make_pipeline(transformer: FluxTransformer2DModel) -> FluxPipeline:
    """Diffusers' pipeline of the transformer and the emoji model's autoencoder; `prompt` makes its arguments."""
    base = StableDiffusionPipeline.from_pretrained(HERE)
    base.vae.register_to_config(shift_factor=0.0)
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=base.vae,
        text_encoder=base.text_encoder,
        tokenizer=base.tokenizer,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=transformer,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def prompt(pipe: FluxPipeline, thing: str, guidance: float = 3.0) -> dict[str, Any]:
    """Arguments of the pipeline's call for the picture of a thing, with guidance away from the empty caption."""
    words, pooled = describe(pipe, [thing, ""])
    return {
        "prompt_embeds": words[:1],
        "pooled_prompt_embeds": pooled[:1],
        "negative_prompt_embeds": words[1:],
        "negative_pooled_prompt_embeds": pooled[1:],
        "true_cfg_scale": guidance,
        "height": FINE.pixels,
        "width": FINE.pixels,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("work"), help="checkpoints go here")
    parser.add_argument("--output", type=Path, default=Path("flux"), help="the transformer goes here")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    train(args.work).half().save_pretrained(args.output)


if __name__ == "__main__":
    main()
