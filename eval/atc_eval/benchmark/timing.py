"""Timings taken in turn, so that the machine's drifts affect all candidates, and the Markdown tables they fill."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, TextIO, TypeVar

import torch

Name = TypeVar("Name")
Call = Callable[[], Any]
Row = Sequence[str]


@dataclass(frozen=True)
class Timing:
    """Seconds per call, and the peak of GPU memory in bytes beyond what was allocated before (0 on a CPU)."""

    seconds: float
    peak: int


def take_turns(
    candidates: Mapping[Name, Call], repeats: int, device: str, calls: int = 1, warm_ups: int = 1
) -> dict[Name, Timing]:
    """The median of `repeats` timings of each candidate, taken in turn; each timing spans `calls` calls."""
    for candidate in candidates.values():
        for _ in range(warm_ups):
            candidate()
    timings: dict[Name, list[Timing]] = {name: [] for name in candidates}
    for _ in range(repeats):
        for name, candidate in candidates.items():
            timings[name].append(_time(candidate, device, calls))
            print(f"{name}: {timings[name][-1].seconds:.3g} s", file=sys.stderr, flush=True)
    return {
        name: Timing(median(each.seconds for each in several), max(each.peak for each in several))
        for name, several in timings.items()
    }


def _time(call: Call, device: str, calls: int) -> Timing:
    is_gpu, before = device == "cuda", 0
    if is_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    if is_gpu:
        torch.cuda.synchronize()
    seconds = (time.perf_counter() - start) / calls
    return Timing(seconds, torch.cuda.max_memory_allocated() - before if is_gpu else 0)


def table(title: str, note: str, columns: Row, rows: Iterable[Row]) -> Iterator[str]:
    """The lines of a table in GitHub's Markdown; it ends early where the GPU has too little memory."""
    yield from ["", f"## {title}", "", note, "", _line(columns), _line(["---"] * len(columns))]
    try:
        yield from map(_line, rows)
    except torch.OutOfMemoryError:
        yield _line(["out of memory", *[""] * (len(columns) - 1)])


def _line(cells: Row) -> str:
    return f"| {' | '.join(cells)} |"


def write(lines: Iterable[str], files: Iterable[TextIO]) -> None:
    """Write each line to all files at once, so that an interrupted run keeps what it has measured."""
    for line in lines:
        for file in files:
            print(line, file=file, flush=True)


def mebibytes(size: float) -> str:
    return f"{size / 2**20:.0f}"
