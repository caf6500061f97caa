"""Timing: every candidate warms up, then they take turns, so that drifts of the machine's speed affect all of them."""

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

Call = Callable[[], Any]


@dataclass(frozen=True)
class Timing:
    """Seconds per call, and the peak of GPU memory in bytes beyond what was allocated before (0 on a CPU)."""

    seconds: float
    peak: int


def take_turns(
    candidates: Mapping[str, Call], repeats: int, device: str, calls: int = 1, warm_ups: int = 1
) -> dict[str, Timing]:
    """The median of `repeats` timings of each candidate, taken in turn; each timing spans `calls` calls."""
    for candidate in candidates.values():
        for _ in range(warm_ups):
            candidate()
    timings: dict[str, list[Timing]] = {name: [] for name in candidates}
    for _ in range(repeats):
        for name, candidate in candidates.items():
            timings[name].append(_time(candidate, device, calls))
            print(f"{name}: {timings[name][-1].seconds:.3g} s", file=sys.stderr, flush=True)
    return {name: _median(several) for name, several in timings.items()}


def time_alone(name: str, call: Call, repeats: int, device: str, warm_ups: int = 1) -> Timing:
    return take_turns({name: call}, repeats, device, warm_ups=warm_ups)[name]


def _time(call: Call, device: str, calls: int) -> Timing:
    before = _start_on_gpu() if device == "cuda" else 0
    start = time.perf_counter()
    for _ in range(calls):
        call()
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = (time.perf_counter() - start) / calls
    return Timing(seconds, torch.cuda.max_memory_allocated() - before if device == "cuda" else 0)


def _start_on_gpu() -> int:
    """Wait until the GPU is idle; return the bytes allocated there."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def _median(timings: list[Timing]) -> Timing:
    return Timing(median(timing.seconds for timing in timings), max(timing.peak for timing in timings))
