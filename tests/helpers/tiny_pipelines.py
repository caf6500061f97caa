"""Whole pipelines at tiny size, with random weights; images are 8 times as large as latents, as with real models."""

from pathlib import Path

from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers import Tokenizer
from tokenizers.models import Unigram
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from atc_diffusion.testing import FLUX, PIXART, SD3, SDXL, UNET

EMOJI = Path(__file__).parents[2] / "examples" / "emoji_diffusion"
TEXT = 128  # width of the text encoder of emoji_diffusion


def sd15() -> StableDiffusionPipeline:
    unet = UNet2DConditionModel(**UNET | {"sample_size": 16, "cross_attention_dim": TEXT})
    no_checker = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return StableDiffusionPipeline(
        _vae(), _clip(), _tokenizer(), unet, DDIMScheduler(clip_sample=False, steps_offset=1), **no_checker
    )


def controlnet() -> ControlNetModel:
    return ControlNetModel.from_unet(sd15().unet, conditioning_embedding_out_channels=(4, 8, 8, 8))


def sdxl() -> StableDiffusionXLPipeline:
    blocks = {
        "block_out_channels": (16, 32, 32),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 1, 2),
    }
    texts = {"cross_attention_dim": 2 * TEXT, "projection_class_embeddings_input_dim": 6 * 4 + TEXT}
    unet = UNet2DConditionModel(**SDXL | {"sample_size": 16} | blocks | texts)
    texts = {"text_encoder": _clip(), "text_encoder_2": _projecting_clip(), "tokenizer": _tokenizer()}
    return StableDiffusionXLPipeline(
        vae=_vae(), unet=unet, scheduler=EulerDiscreteScheduler(), tokenizer_2=_tokenizer(), **texts
    )


def sd3() -> StableDiffusion3Pipeline:
    texts = {"joint_attention_dim": 2 * TEXT, "pooled_projection_dim": 2 * TEXT}
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(**SD3 | texts),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=_vae(latent_channels=16),
        text_encoder=_projecting_clip(),
        tokenizer=_tokenizer(),
        text_encoder_2=_projecting_clip(),
        tokenizer_2=_tokenizer(),
        text_encoder_3=_t5(2 * TEXT),
        tokenizer_3=_t5_tokenizer(),
    )


def flux() -> FluxPipeline:
    texts = {"pooled_projection_dim": TEXT, "guidance_embeds": True}
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=_vae(),
        text_encoder=_clip(),
        tokenizer=_tokenizer(),
        text_encoder_2=_t5(12),
        tokenizer_2=_t5_tokenizer(),
        transformer=FluxTransformer2DModel(**FLUX | texts),
    )


def pixart() -> PixArtSigmaPipeline:
    return PixArtSigmaPipeline(
        tokenizer=_t5_tokenizer(),
        text_encoder=_t5(12),
        vae=_vae(),
        transformer=PixArtTransformer2DModel(**PIXART | {"sample_size": 32, "out_channels": 8}),
        scheduler=DPMSolverMultistepScheduler(),
    )


def _vae(latent_channels: int = 4) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(4,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=latent_channels,
        norm_num_groups=2,
        shift_factor=0.0,
    )


def _tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(EMOJI / "tokenizer")


def _clip() -> CLIPTextModel:
    return CLIPTextModel(CLIPTextConfig.from_pretrained(EMOJI / "text_encoder"))


def _projecting_clip() -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(CLIPTextConfig.from_pretrained(EMOJI / "text_encoder"))


def _t5(width: int) -> T5EncoderModel:
    return T5EncoderModel(T5Config(vocab_size=256, d_model=width, d_kv=4, d_ff=16, num_layers=1, num_heads=2))


def _t5_tokenizer() -> T5TokenizerFast:
    vocabulary = Unigram([("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁a", -1.0)], unk_id=2)
    return T5TokenizerFast(tokenizer_object=Tokenizer(vocabulary))
