"""A table of what there is to save: self-attention's share of a network's arithmetic."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmark.models import BATCH, MODELS, make_inputs
from benchmark.step import layers, levels
from benchmark.tables import Rows, Table

NOTE = (
    "QK^T and its product with the values, 4 N² C operations an attention, as a share of what PyTorch counts for the"
    " whole network. Merging queries and keys saves at most 1 - r · r_keys of a level's share. Time follows only"
    " roughly: attention may run slower per operation than convolutions do."
)


def arithmetic_table(models: Sequence[tuple[str, int]]) -> Table:
    rows = [Rows([[MODELS[model].title, f"{size} x {size}"]], partial(_shares, model, size)) for model, size in models]
    title = f"What there is to save: the arithmetic of a step, batch {BATCH}"
    return Table(title, NOTE, ["network", "picture", "TFLOP", "finest level", "second level"], rows)


def _shares(model: str, size: int) -> list[list[str]]:
    with torch.device("meta"):
        network = MODELS[model].build()
    latents, inputs = make_inputs(model, network, size)
    with FlopCounterMode(display=False) as counter:
        network(latents, timestep=torch.zeros(BATCH, device="meta"), **inputs)
    total = counter.get_total_flops()
    return [
        [f"{total / 1e12:.3g}", *(f"{self_attention(network, size, level) / total:.1%}" for level in _two(network))]
    ]


def _two(network: Any) -> tuple[int, int]:
    finest = levels(network)[0]
    return finest, 2 * finest


def self_attention(network: Any, size: int, level: int) -> int:
    """Operations of the products of queries, keys and values at one level; 0 if there is none."""
    num_tokens = (size // 8 // level) ** 2
    widths = [layer.channels for layer in layers(network, "all") if layer.level == level]
    return sum(4 * BATCH * num_tokens**2 * width for width in widths)
