"""A table of how much self-attention could save: its fraction of a network's arithmetic."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from atc_eval.benchmark.full_size import BATCH, MODELS, make_inputs
from atc_eval.benchmark.markdown import Row, Table
from atc_eval.benchmark.step import Setting, layers, levels

NOTE = (
    "The products of queries with keys and of attention weights with values, 4 N² C operations per attention, as a "
    "fraction of the operations that PyTorch counts for the whole network. Merging saves at most 1 - r · r_keys of a "
    "level's fraction. Time follows only roughly, because attention may run slower per operation than convolutions do."
)


def arithmetic_table(settings: Sequence[Setting]) -> Table:
    title = f"What there is to save: the arithmetic of a step, batch {BATCH}"
    return Table(title, NOTE, ["network", "image", "TFLOP", "finest level", "second level"], _rows(settings))


def _rows(settings: Sequence[Setting]) -> Iterator[Row]:
    for setting in settings:
        model, size = setting.model, setting.size
        with torch.device("meta"):
            network = MODELS[model].build()
        latents, inputs = make_inputs(model, network, size)
        with FlopCounterMode(display=False) as counter:
            network(latents, timestep=torch.zeros(BATCH, device="meta"), **inputs)
        total, finest = counter.get_total_flops(), levels(network)[0]
        fractions = [f"{self_attention(network, size, level) / total:.1%}" for level in (finest, 2 * finest)]
        yield MODELS[model].title, f"{size} x {size}", f"{total / 1e12:.3g}", *fractions


def self_attention(network: Any, size: int, level: int) -> int:
    """Operations of the products of queries, keys and values at one level; 0 if it has no self-attention."""
    num_tokens = (size // 8 // level) ** 2
    widths = [layer.channels for layer in layers(network, "all") if layer.level == level]
    return sum(4 * BATCH * num_tokens**2 * width for width in widths)
