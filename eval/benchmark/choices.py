"""The options of the benchmark; their defaults depend on the device."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from arguments import checks
from arguments.options import option
from benchmark.models import MODELS
from benchmark.step import CANDIDATES, Setting

DTYPES = ("float32", "float16", "bfloat16")
PARTS = ("arithmetic", "small", "clustering", "growth", "step", "training", "compile")
DEFAULTS: dict[str, dict[str, Any]] = {
    "cpu": {
        "parts": tuple(part for part in PARTS if part not in ("training", "compile")),
        "model": ("sd15",),
        "keep": (60.0, 40.0),
        "tokens": (4096,),
        "dtype": "float32",
    },
    "cuda": {
        "parts": tuple(part for part in PARTS if part not in ("small", "training")),
        "model": ("sd15", "sdxl"),
        "keep": (60.0, 40.0, 25.0),
        "tokens": (1024, 4096, 16384),
        "dtype": "float16",
    },
}


@dataclass(frozen=True)
class Benchmark:
    """The options of the command line."""

    device: str = option("device to time", "cpu", choices=list(DEFAULTS))
    parts: tuple[str, ...] = option("(default: all but training; CPU: no compile; GPU: no small)", (), choices=PARTS)
    model: tuple[str, ...] = option("(default: sd15; GPU: sd15 sdxl)", (), choices=list(MODELS))
    blocks: int | None = option("time only so many of a transformer's blocks (default: all)", None, checks.whole(1))
    dtype: str | None = option("of the steps (default: float32; GPU: float16)", None, choices=DTYPES)
    size: tuple[int, ...] = option(
        "pixels a side (default: 512, others than sd15 1024; GPU: sd15 at 512, 1024 and 2048)", (), checks.whole(64, 64)
    )
    keep: tuple[float, ...] = option(
        "percentages of the tokens kept; all parts but step and training take the first (default: 60 40; GPU: 25 too)",
        (),
        checks.percent,
    )
    candidates: tuple[str, ...] = option("(default: all)", CANDIDATES, choices=CANDIDATES, nargs="*")
    tokens: tuple[int, ...] = option("of the clustering (default: 4096; GPU: 1024 4096 16384)", (), checks.whole(1))
    growth_tokens: tuple[int, ...] = option(
        "of the clustering whose growth is measured (default: 1024 to 16384)",
        tuple(2**power for power in range(10, 15)),
        checks.whole(1),
    )
    repeats: int = option("timings of every candidate", 3, checks.whole(1))
    out: Path | None = option("file for a copy of the output", None, checks.file_to_write(".md", ".txt"))

    def __post_init__(self) -> None:
        for name, default in DEFAULTS[self.device].items():
            object.__setattr__(self, name, getattr(self, name) or default)

    def settings(self) -> list[Setting]:
        """The networks whose steps are timed, the smallest pictures first."""
        several = None if self.device == "cuda" else 1
        sizes = [(size, name) for name in self.model for size in self.size or MODELS[name].sizes[:several]]
        return [
            Setting(name, size, self.device, getattr(torch, str(self.dtype)), MODELS[name].blocks and self.blocks)
            for size, name in sorted(sizes, key=lambda each: each[0])
        ]
