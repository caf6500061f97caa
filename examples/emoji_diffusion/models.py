"""The untrained parts of the emoji model: small forms of Stable Diffusion 1.x's own classes."""

import math
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

DEVIATION = 0.05  # of the latents' posterior, which is the same everywhere
TEXT_WIDTH, MAX_TOKENS = 128, 16


def make_pipeline(vae: AutoencoderKL, names: list[str], tokenizer_folder: Path) -> StableDiffusionPipeline:
    """Put an untrained text encoder and UNet together with a trained autoencoder."""
    tokenizer = make_tokenizer(names, tokenizer_folder)
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=make_text_encoder(tokenizer),
        tokenizer=tokenizer,
        unet=make_unet(),
        scheduler=make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def make_tokenizer(names: list[str], folder: Path) -> CLIPTokenizer:
    """Train a byte-pair vocabulary on the names, with CLIP's conventions, unless `folder` has one.

    Ties are broken at random, so a second vocabulary would not fit the weights of a run that is resumed.
    """
    vocab, merges = folder / "vocab.json", folder / "merges.txt"
    if not vocab.exists():
        train_vocabulary(names, folder)
    return CLIPTokenizer(vocab=str(vocab), merges=str(merges), model_max_length=MAX_TOKENS)


def train_vocabulary(names: list[str], folder: Path) -> None:
    """Write `vocab.json` and `merges.txt` to `folder`."""
    blank = CLIPTokenizer().backend_tokenizer
    trainer = BpeTrainer(
        vocab_size=2048,
        special_tokens=["<|startoftext|>", "<|endoftext|>"],
        initial_alphabet=ByteLevel.alphabet(),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    blank.train_from_iterator(names, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    blank.model.save(str(folder))


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Build a two-layer CLIP text encoder."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def make_autoencoder() -> AutoencoderKL:
    """Build an autoencoder of factor 4 with 4 latent channels, without attention."""
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        norm_num_groups=8,
        sample_size=256,
        force_upcast=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )
    fix_deviation(vae)
    return vae.to(memory_format=torch.channels_last)


def fix_deviation(vae: AutoencoderKL) -> None:
    """Let the encoder's second half of outputs, the logarithm of the variance, be constant."""
    mean, log_variance = vae.encoder.conv_out.weight.data.chunk(2)
    log_variance.zero_()
    vae.encoder.conv_out.bias.data[len(mean) :] = 2 * math.log(DEVIATION)


def make_unet() -> UNet2DConditionModel:
    """Build a UNet with five transformer blocks at the finest level."""
    unet = UNet2DConditionModel(
        sample_size=64,
        block_out_channels=(48, 96, 144),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=2,
        attention_head_dim=(3, 6, 9),
        cross_attention_dim=TEXT_WIDTH,
        norm_num_groups=16,
    )
    return unet.to(memory_format=torch.channels_last)


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
