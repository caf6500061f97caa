"""What the examples share: their options, the pipeline that draws, and what merging did in it."""

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from atc_diffusion import RecordedMerge, load_pipeline, merge_maps
from atc_diffusion.commands import SEEDS, Help, check_finite, check_number

EMOJI = str(Path(__file__).parent / "emoji_diffusion")


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with the options of every example."""
    parser = argparse.ArgumentParser(description=description, formatter_class=Help)
    model = "hub id or folder of a diffusers pipeline (default: the bundled one)"
    parser.add_argument("--model", default=EMOJI, help=model)
    parser.add_argument("--steps", type=int, default=20, help="denoising steps")
    parser.add_argument("--guidance", type=float, default=3.0, help="classifier-free guidance scale")
    parser.add_argument("--size", type=int, help="side in pixels (default: the model's own)")
    return parser


def check_drawing(args: argparse.Namespace) -> None:
    """Refuse what would fail only once the pipeline draws."""
    check_number("--steps", args.steps)
    check_number("--size", args.size, least=8, multiple=8)
    check_finite("--guidance", args.guidance)
    if args.seed not in SEEDS:
        raise ValueError(f"--seed must fit into 64 bits, got {args.seed}; give one closer to 0")


def load(model: str) -> Any:
    """The pipeline of a hub id or folder, in float16 on a CUDA GPU and in float32 elsewhere."""
    device, dtype = ("cuda", torch.float16) if torch.cuda.is_available() else ("cpu", torch.float32)
    return load_pipeline(model, dtype).to(device)


def draw_images(
    pipe: Any, prompts: list[str], seed: int, size: int | None, steps: int, **options: Any
) -> tuple[list[Image.Image], float]:
    """An image of each prompt, all from the noise of one seed, and the seconds that they took."""
    start = time.perf_counter()
    generators = [torch.Generator().manual_seed(seed) for _ in prompts]
    output = pipe(prompts, height=size, width=size, num_inference_steps=steps, generator=generators, **options)
    return output.images, time.perf_counter() - start


@dataclass(frozen=True)
class Partition:
    """Which tokens of an image one attention merged; for a batch, of its last item."""

    layer: str  # the attention's path in the pipeline
    tokens: str  # which have these clusters: "queries", "keys and values" or "all tokens"
    step: int  # the first that used the clusters, counted from 0; they may serve the following steps too
    labels: NDArray[np.int64]  # cluster of every token, [H, W]

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
    found = []
    for record in merge_maps(pipe):
        layer = path(record.network, record.layer)
        named = {"queries": record.queries, "keys and values": record.keys}
        if record.queries is record.keys:
            named = {"all tokens": record.queries}
        for tokens, merge_map in named.items():
            if merge_map is not None and first.setdefault((layer, tokens, id(merge_map)), record) is record:
                labels = merge_map.labels[-1].reshape(record.grid).cpu().numpy()
                found.append(Partition(layer, tokens, record.step, labels))
    return found


def path(network: str, layer: str) -> str:
    """Where a layer is in the pipeline; a network that was patched by itself has no name."""
    return f"{network}.{layer}" if network else layer


def at_step(found: Sequence[Partition], step: int) -> Partition:
    """The one of a layer's partitions that was in use at `step`: the newest that is not from a later step."""
    return max((each for each in found if each.step <= step), key=lambda each: each.step, default=found[0])
