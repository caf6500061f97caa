"""A table of the cost of proportional attention: its weights as a mask, folded into the head, and off."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile

from atc_diffusion.adapters.weights import wider_heads
from benchmark.engines import num_kept
from benchmark.models import BATCH, MODELS
from benchmark.tables import Row, Table
from benchmark.timing import Call, take_turns

CALLS = {"cpu": 1, "cuda": 10}  # per timing
OPERATOR = "aten::_scaled_dot_product_"
HEADS = {"sd15": (8, 40, 8), "sdxl": (10, 64, 16)}  # at the finest level: heads, their width, pixels a side of a token


def attention_table(model: str, size: int, keeps: Sequence[float], repeats: int, device: str) -> Table:
    count, width, pixels = HEADS[model]
    num_queries, dtype = (size // pixels) ** 2, torch.float16 if device == "cuda" else torch.float32
    q = torch.randn(BATCH, count, num_queries, width).to(device, dtype)
    return Table(
        f"Proportional attention at the finest level of {MODELS[model].title}, {size} x {size}, {str(dtype)[6:]}",
        f"Queries {list(q.shape)} and K keys, the fraction kept; median of {repeats}. The logarithms of the sizes are "
        "left out (off), passed as a mask [2, 1, 1, K], folded into the head (time to pad queries, keys and values "
        "included), or folded before (that time excluded).",
        ("keep", "weights", "ms", "ratio to off", "kernel"),
        _rows(q, keeps, repeats, device),
    )


def _rows(q: Tensor, keeps: Sequence[float], repeats: int, device: str) -> Iterator[Row]:
    for keep in keeps:
        num_keys = num_kept(q.shape[2], keep)
        k, v = torch.randn(2, *q.shape[:2], num_keys, q.shape[3]).to(q)
        candidates = ways(q, k, v, torch.randint(1, 5, (BATCH, num_keys)).log().to(q))
        timings = take_turns(candidates, repeats, device, CALLS[device])
        for name, timing in timings.items():
            ratio = timing.seconds / timings["off"].seconds
            yield f"{keep:g} %", name, f"{1000 * timing.seconds:.3f}", f"{ratio:.2f}", kernel(candidates[name])


def ways(q: Tensor, k: Tensor, v: Tensor, log_sizes: Tensor) -> dict[str, Call]:
    """Attention of `q` `[B, H, Q, D]` to `k` and `v` `[B, H, K, D]`, weighted by `log_sizes` `[B, K]`."""
    mask, folded, width = log_sizes[:, None, None, :], fold(q, k, v, log_sizes), q.shape[3]
    return {
        "off": lambda: scaled_dot_product_attention(q, k, v),
        "mask": lambda: scaled_dot_product_attention(q, k, v, mask),
        "folded": lambda: attend_folded(*fold(q, k, v, log_sizes), width),
        "folded before": lambda: attend_folded(*folded, width),
    }


def fold(q: Tensor, k: Tensor, v: Tensor, log_sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The library's `wider_heads` for heads `[B, H, N, D]`."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    q, k, v = (x.transpose(1, 2) for x in wider_heads(q, k, v, log_sizes))
    return q, k, v


def attend_folded(q: Tensor, k: Tensor, v: Tensor, width: int) -> Tensor:
    """Attention `[B, H, Q, width]` of the outputs of `fold`, for heads that were `width` wide."""
    return scaled_dot_product_attention(q, k, v, scale=width**-0.5)[..., :width]


def kernel(call: Call) -> str:
    """The attention operator that `call` ran, and on a GPU the kernel that took longest."""
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
