"""Distil the emoji model to four steps without guidance, into a LoRA beside its weights.

    pip install peft
    python examples/emoji_diffusion/distil.py --work work

The teacher is the model itself at guidance 3, with twice as many DDIM steps. The student, the model with a LoRA, learns
to land after each step where the teacher is after two: progressive distillation (Salimans and Ho 2022), with the
guidance distilled too (Meng et al. 2023). Each of the student's steps starts where its last one landed, so it learns to
correct its own errors. Rerun the command to resume. `--sheet` only draws the student's contact sheet.
"""

import argparse
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline
from peft import LoraConfig, get_peft_model_state_dict
from torch import Tensor
from train import HERE, THINGS, draw_sheet, merging, tokenize
from training import Phase, Training

from atc_diffusion import ATCConfig, patched

STEPS = 4
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"]
RESNETS = ["conv1", "conv2", "conv_shortcut", "time_emb_proj"]
OTHERS = ["conv_in", "conv_out", "downsamplers.0.conv", "upsamplers.0.conv"]
LORA = LoraConfig(r=8, lora_alpha=8, target_modules=ATTENTION + RESNETS + OTHERS)
PHASE = Phase("distil", pixels=256, batch=2, steps=200, rate=2e-3, merged=0.7)


def distil(pipe: StableDiffusionPipeline, work: Path, output: Path) -> None:
    """Train a LoRA of the UNet on the teacher's trajectories and write it in half precision."""
    teach(pipe, work / "trajectories", range(3))
    pipe.unet.requires_grad_(False).add_adapter(LORA)
    pipe.scheduler.set_timesteps(STEPS)
    texts = pipe.text_encoder(tokenize(pipe, THINGS))[0].detach()
    loss = partial(landing_loss, pipe, texts, work / "trajectories", PHASE)
    Training({"unet": pipe.unet}, PHASE, work).run(loss)
    pipe.save_lora_weights(output, get_peft_model_state_dict(pipe.unet.half()))


def teach(pipe: StableDiffusionPipeline, folder: Path, seeds: range) -> None:
    """Write the teacher's trajectory of each thing from each seed, unless it is there."""
    folder.mkdir(parents=True, exist_ok=True)
    with patched(pipe, ATCConfig.fast()):
        for i, seed in ((i, seed) for seed in seeds for i in range(len(THINGS))):
            path = folder / f"{seed}-{i:02d}.pt"
            if not path.exists():
                torch.save(trajectory(pipe, THINGS[i], seed * 100 + i), path)


def trajectory(pipe: StableDiffusionPipeline, prompt: str, seed: int) -> Tensor:
    """The teacher's latents [STEPS + 1, 4, H, W], from noise to picture, after every second step."""
    side = pipe.unet.config.sample_size
    noise = torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(seed))
    points = [noise]
    keep = partial(append_latents, points)
    arguments = {"guidance_scale": 3.0, "num_inference_steps": 2 * STEPS, "output_type": "latent"}
    pipe(prompt, latents=noise, callback_on_step_end=keep, **arguments)
    return torch.cat(points[::2])


def append_latents(
    points: list[Tensor], _pipe: StableDiffusionPipeline, _step: int, _time: int, tensors: dict[str, Tensor]
) -> dict[str, Tensor]:
    """A callback of the pipeline's steps."""
    points.append(tensors["latents"])
    return tensors


def landing_loss(pipe: StableDiffusionPipeline, texts: Tensor, folder: Path, phase: Phase, step: int) -> Tensor:
    """The mean squared distance of the student's latents from the teacher's, after each of its steps."""
    paths = sorted(folder.glob("*.pt"))
    chosen = [paths[i] for i in torch.randint(len(paths), (phase.batch,)).tolist()]
    text = texts[[int(path.stem[-2:]) for path in chosen]]
    latents, *targets = torch.stack([torch.load(path) for path in chosen], 1)
    loss = torch.zeros(())
    with merging(pipe, step < phase.merged * phase.steps):
        for time, target in zip(pipe.scheduler.timesteps, targets, strict=True):
            guess = pipe.unet(latents.contiguous(memory_format=torch.channels_last), time, text).sample
            landed = pipe.scheduler.step(guess, time, latents).prev_sample
            loss = loss + F.mse_loss(landed, target) / STEPS
            latents = landed.detach()
    return loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("work"), help="trajectories and checkpoints go here")
    parser.add_argument("--output", type=Path, default=HERE / "four_steps", help="the LoRA and its sheet go here")
    parser.add_argument("--sheet", action="store_true", help="only draw the contact sheet")
    args = parser.parse_args()
    if not args.sheet:
        torch.manual_seed(0)
        distil(StableDiffusionPipeline.from_pretrained(HERE), args.work, args.output)
    student = StableDiffusionPipeline.from_pretrained(HERE)
    student.load_lora_weights(args.output)
    draw_sheet(student, args.output / "contact_sheet.webp", num_inference_steps=STEPS, guidance_scale=1.0)


if __name__ == "__main__":
    main()
