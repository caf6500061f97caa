"""The pipeline of an example, by default the small Stable Diffusion that ships here, and what merging did in it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from atc_diffusion import MergeMap, RecordedMerge, load_pipeline, merge_maps
from atc_diffusion.commands import SEEDS

EMOJI = str(Path(__file__).parent / "emoji_diffusion")


def check_drawing(steps: int, size: int | None, guidance: float, seed: int = 0) -> None:
    """Refuse what would fail only once the pipeline draws."""
    if steps < 1:
        raise ValueError(f"--steps must be at least 1, got {steps}")
    if size is not None and (size < 8 or size % 8):
        raise ValueError(f"--size must be a multiple of 8 pixels, at least 8, got {size}")
    if not math.isfinite(guidance):
        raise ValueError(f"--guidance must be a finite number, got {guidance}")
    if seed not in SEEDS:
        raise ValueError(f"--seed must fit into 64 bits, got {seed}; give one closer to 0")


def load(model: str) -> Any:
    """The pipeline of a hub id or folder, in float16 on a CUDA GPU and in float32 elsewhere."""
    device, dtype = ("cuda", torch.float16) if torch.cuda.is_available() else ("cpu", torch.float32)
    return load_pipeline(model, dtype).to(device)


def draw_images(pipe: Any, prompts: list[str], seed: int, size: int | None, steps: int, **options: Any) -> Any:
    """An image of each prompt, all from the noise of one seed; `size` is its side in pixels, None for the model's."""
    generators = [torch.Generator().manual_seed(seed) for _ in prompts]
    return pipe(prompts, height=size, width=size, num_inference_steps=steps, generator=generators, **options).images


@dataclass(frozen=True)
class Partition:
    """Which tokens of an image one attention merged; for a batch, of its last item.

    Attributes:
        layer: the attention's path in the pipeline.
        tokens: whether the clusters are those of the "queries", of the "keys and values", or of "all tokens".
        step: the first step that used the clusters, counted from 0; they may serve the following steps too.
        labels: cluster of every token, `[H, W]`.
    """

    layer: str
    tokens: str
    step: int
    labels: NDArray[np.int64]

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Number of tokens in every cluster, `[K]`."""
        return np.bincount(self.labels.ravel())

    @property
    def name(self) -> str:
        """Layer and tokens, short enough for a menu."""
        layer = self.layer.removesuffix(".attn1").replace(".transformer_blocks", "").replace("_blocks", "")
        return f"{layer}: {self.tokens}"


def partitions(pipe: Any) -> list[Partition]:
    """What the last run of a pipeline, patched with `record=True`, merged: by step, then in the order of the layers.

    Clusters that serve several steps are there once.
    """
    first: dict[tuple[str, str, int], RecordedMerge] = {}
    return [
        Partition(layer, tokens, record.step, merge_map.labels[-1].reshape(record.grid).cpu().numpy())
        for record in merge_maps(pipe)
        for layer in [path(record.network, record.layer)]
        for tokens, merge_map in _merged(record).items()
        if first.setdefault((layer, tokens, id(merge_map)), record) is record
    ]


def path(network: str, layer: str) -> str:
    """Where a layer is in the pipeline; a network that was patched by itself has no name."""
    return f"{network}.{layer}" if network else layer


def at_step(found: Sequence[Partition], step: int) -> Partition:
    """The one of a layer's partitions that was in use at `step`: the newest that is not from a later step."""
    return max((each for each in found if each.step <= step), key=lambda each: each.step, default=found[0])


def _merged(record: RecordedMerge) -> dict[str, MergeMap]:
    """What was merged of one attention, once where queries and keys were merged alike."""
    if record.queries is not None and record.queries is record.keys:
        return {"all tokens": record.queries}
    named = {"queries": record.queries, "keys and values": record.keys}
    return {tokens: merge_map for tokens, merge_map in named.items() if merge_map is not None}
