"""How calls are timed: warmed up, in turns, by the device's own clock."""

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
    """One call: its seconds, and the most bytes of GPU memory that it had at a time (0 on the CPU)."""

    seconds: float
    peak: int


def take_turns(
    candidates: Mapping[str, Call],
    repeats: int,
    device: str,
    calls: int = 1,
    warm_ups: int = 1,
) -> dict[str, Timing]:
    """The median of `repeats` timings of every candidate: each warms up first, then they alternate.

    Args:
        candidates: what is timed, by name.
        repeats: how often each is timed.
        device: "cpu" or "cuda".
        calls: how many calls are timed together, for those that are short.
        warm_ups: how many calls of each are not timed.
    """
    for candidate in candidates.values():
        for _ in range(warm_ups):
            candidate()
    timings: dict[str, list[Timing]] = {name: [] for name in candidates}
    for _ in range(repeats):
        for name, candidate in candidates.items():
            timings[name].append(_time(candidate, device, calls))
            print(f"{name}: {timings[name][-1].seconds:.3g} s", file=sys.stderr, flush=True)
    return {name: _median(several) for name, several in timings.items()}


def _time(call: Call, device: str, calls: int) -> Timing:
    return _time_on_gpu(call, calls) if device == "cuda" else _time_on_cpu(call, calls)


def _time_on_cpu(call: Call, calls: int) -> Timing:
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return Timing((time.perf_counter() - start) / calls, peak=0)


def _time_on_gpu(call: Call, calls: int) -> Timing:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    start.record()
    for _ in range(calls):
        call()
    end.record()
    torch.cuda.synchronize()
    return Timing(start.elapsed_time(end) / 1000 / calls, torch.cuda.max_memory_allocated() - before)


def _median(timings: list[Timing]) -> Timing:
    return Timing(median(timing.seconds for timing in timings), max(timing.peak for timing in timings))
