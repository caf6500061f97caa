"""A table of what there is to save: self-attention's share of a UNet's arithmetic."""

from collections.abc import Sequence
from functools import partial

import torch
from diffusers import UNet2DConditionModel
from speed_tables import Rows, Table
from speed_unet import BATCH, TITLES, UNET, finest_level, layers, make_inputs
from torch.utils.flop_counter import FlopCounterMode

NOTE = (
    "QK^T and its product with the values, 4 N² C operations an attention, as a share of what PyTorch counts for the"
    " whole UNet. Merging tokens saves at most 1 - r² of a level's share, merging keys and values 1 - r. Time follows"
    " only roughly: attention may run slower per operation than convolutions do."
)


def arithmetic_table(models: Sequence[tuple[str, int]]) -> Table:
    rows = [Rows([[TITLES[model], f"{size} x {size}"]], partial(_shares, model, size)) for model, size in models]
    title = f"What there is to save: the arithmetic of a step, batch {BATCH}"
    return Table(title, NOTE, ["UNet", "picture", "TFLOP", "finest level", "second level"], rows)


def _shares(model: str, size: int) -> list[list[str]]:
    with torch.device("meta"):
        unet = UNet2DConditionModel(**UNET[model])
    sample, inputs = make_inputs(unet, size)
    with FlopCounterMode(display=False) as counter:
        unet(sample, torch.zeros((), device="meta"), **inputs)
    total = counter.get_total_flops()
    finest = finest_level(unet)
    shares = [self_attention(unet, size, downsample) / total for downsample in (finest, 2 * finest)]
    return [[f"{total / 1e12:.3g}", *(f"{share:.1%}" for share in shares)]]


def self_attention(unet: UNet2DConditionModel, size: int, downsample: int) -> int:
    """Operations of the products of queries, keys and values at one level."""
    num_tokens = (size // 8 // downsample) ** 2
    names = [layer.name for layer in layers(unet, downsample) if layer.downsample == downsample]
    widths = [unet.get_submodule(f"{name}.attn1.to_k").out_features for name in names]
    return sum(4 * BATCH * num_tokens**2 * width for width in widths)
