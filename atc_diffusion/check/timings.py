"""One clustering, and one attention with and without merging."""

import time
from collections.abc import Callable, Iterator
from statistics import median

import torch

from atc_diffusion.adapters.weights import attend
from atc_diffusion.check.finding import Finding
from atc_diffusion.clustering.windows import cluster_windows

ROUNDS = 3
# The finest level of Stable Diffusion 1 at 512 x 512, and an eighth of its keys.
SIDE, CHANNELS, HEADS, KEYS = 64, 320, 8, 512


def check_speed(device: torch.device) -> Iterator[Finding]:
    subject = f"speed on {device}, 512 x 512"
    try:
        full, masked, widened, clustering = _medians(device)
    except Exception as problem:  # whatever a driver, a compiler or a missing operation raises
        yield Finding(subject, f"{type(problem).__name__}: {str(problem).strip().splitlines()[0]}")
        return
    note = (
        f"attention {full * 1e3:.2f} ms; merged {masked / full:.2f} of it (with widen_heads=True"
        f" {widened / full:.2f}), a clustering {clustering / full:.2f} of it"
    )
    yield Finding(subject, note=note)


@torch.no_grad()
def _medians(device: torch.device) -> list[float]:
    """Seconds that an attention, one with merged keys by each way to weigh them, and a clustering take, in turn."""
    dtype = torch.float32 if device.type == "cpu" else torch.float16
    num_tokens = SIDE * SIDE
    tokens = torch.randn(1, num_tokens, CHANNELS).to(device, dtype)
    heads = tokens.unflatten(2, (HEADS, -1))
    keys, logs = heads[:, :KEYS].contiguous(), torch.zeros(1, KEYS, device=device)
    work: list[Callable[[], object]] = [
        lambda: attend(heads, heads, heads, None, widen=False),
        lambda: attend(heads, keys, keys, logs, widen=False),
        lambda: attend(heads, keys, keys, logs, widen=True),
        lambda: cluster_windows(tokens, (SIDE, SIDE), 16, "ward", num_clusters=KEYS).cut(KEYS),
    ]
    for function in work:
        _seconds(function, device)  # compiles
    return [median(times) for times in zip(*([_seconds(f, device) for f in work] for _ in range(ROUNDS)), strict=True)]


def _seconds(function: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    function()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter() - start
