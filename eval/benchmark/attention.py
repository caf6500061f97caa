"""A table of what proportional attention costs: its weights as a mask, folded into the head, and off."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile

from atc_diffusion import ATCConfig
from benchmark.tables import Rows, Table
from benchmark.timing import Call, take_turns

WAYS = ("off", "mask", "folded", "folded before")
CALLS = {"cpu": 1, "cuda": 10}  # timed together
OPERATOR = "aten::_scaled_dot_product_"


@dataclass(frozen=True)
class Heads:
    """The self-attention of a UNet's finest level: a picture of `size` pixels has `(size / pixels)**2` tokens."""

    title: str
    count: int
    width: int
    pixels: int


HEADS = {
    "sd15": Heads("Stable Diffusion v1.5", count=8, width=40, pixels=8),
    "sdxl": Heads("SDXL", count=10, width=64, pixels=16),
}


def attention_table(model: str, size: int, keeps: Sequence[int], repeats: int, device: str) -> Table:
    heads, dtype = HEADS[model], precision(device)
    num_queries = (size // heads.pixels) ** 2
    return Table(
        f"Proportional attention at the finest level of {heads.title}, {size} x {size}, {str(dtype)[6:]}",
        f"Queries [2, {heads.count}, {num_queries}, {heads.width}] against K keys, the kept share of them; median of "
        f"{repeats}. The logarithms of the sizes: off, as a mask [2, 1, 1, K], folded into the head (padding queries, "
        "keys and values included), and folded before (padding not included).",
        ("keep", "weights", "ms", "ratio to off", "kernel"),
        [
            Rows(
                [(f"{keep} %", way) for way in WAYS],
                partial(
                    _time_attention,
                    heads,
                    num_queries,
                    ATCConfig(r=keep / 100).num_kept(num_queries, 1, None)[1],
                    repeats,
                    device,
                ),
            )
            for keep in keeps
        ],
    )


def precision(device: str) -> torch.dtype:
    return torch.float16 if device == "cuda" else torch.float32


def _time_attention(heads: Heads, num_queries: int, num_keys: int, repeats: int, device: str) -> list[list[str]]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, heads.count, n, heads.width, generator=generator).to(device, precision(device))
        for n in (num_queries, num_keys, num_keys)
    )
    sizes = torch.randint(1, 5, (2, num_keys), generator=generator).to(device)
    candidates = ways(q, k, v, sizes.log().to(q.dtype))
    timings = take_turns(candidates, repeats, device, CALLS[device])
    off = timings["off"].seconds
    return [
        [f"{1000 * timings[way].seconds:.3f}", f"{timings[way].seconds / off:.2f}", kernel(candidates[way])]
        for way in WAYS
    ]


def ways(q: Tensor, k: Tensor, v: Tensor, log_sizes: Tensor) -> dict[str, Call]:
    """Attention of `q` `[B, H, Q, D]` to `k` and `v` `[B, H, K, D]`, weighed by `log_sizes` `[B, K]`."""
    mask, folded, width = log_sizes[:, None, None, :], fold(q, k, v, log_sizes), q.shape[3]
    return {
        "off": lambda: scaled_dot_product_attention(q, k, v),
        "mask": lambda: scaled_dot_product_attention(q, k, v, mask),
        "folded": lambda: attend_folded(*fold(q, k, v, log_sizes), width),
        "folded before": lambda: attend_folded(*folded, width),
    }


def fold(q: Tensor, k: Tensor, v: Tensor, log_sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A channel of ones to `q` and of weights to `k`, then zeros up to a multiple of 8, as fused kernels want.

    `(q, 1) · (k, sqrt(D) log n) / sqrt(D)` is `q · k / sqrt(D) + log n`.
    """
    width = q.shape[3]
    zeros = -(width + 1) % 8
    weights = (width**0.5 * log_sizes)[:, None, :, None].expand(*k.shape[:3], 1)
    return (
        pad(pad(q, (0, 1), value=1.0), (0, zeros)),
        pad(torch.cat([k, weights], dim=3), (0, zeros)),
        pad(v, (0, 1 + zeros)),
    )


def attend_folded(q: Tensor, k: Tensor, v: Tensor, width: int) -> Tensor:
    """Attention `[B, H, Q, width]` of what `fold` returned, at the scale of heads `width` wide."""
    return scaled_dot_product_attention(q, k, v, scale=width**-0.5)[..., :width]


def kernel(call: Call) -> str:
    """The attention operator that `call` ran, and on a GPU the kernel that it was longest in."""
    gpu = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]) as profiler:
        call()
        if gpu:
            torch.cuda.synchronize()
    events = profiler.key_averages()
    operators = [event.key.removeprefix(OPERATOR) for event in events if event.key.startswith(OPERATOR)]
    kernels = [event for event in events if event.device_type.name == "CUDA"]
    longest = sorted(kernels, key=lambda event: event.self_device_time_total)[-1:]
    return ", ".join([*operators[:1], *(event.key[:60].replace("|", " ") for event in longest)])
