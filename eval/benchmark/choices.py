"""What is timed, as the command line says it; what it leaves open depends on the device."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from arguments import checks
from arguments.options import option, switch
from benchmark.models import MODELS
from benchmark.step import CANDIDATES, Setting
from benchmark.tables import NOT_MEASURED

DTYPES = ("float32", "float16", "bfloat16")
GROWTH = (1024, 2048, 4096, 8192, 16384)
PARTS = ("arithmetic", "small", "clustering", "growth", "attention", "step", "training", "compile")


@dataclass(frozen=True)
class Defaults:
    """What is timed on a kind of device; sizes in pixels, by model."""

    parts: Sequence[str]
    model: Sequence[str]
    keep: Sequence[int]
    tokens: Sequence[int]
    dtype: str
    sizes: dict[str, Sequence[int]]


DEFAULTS = {
    "cpu": Defaults(
        [part for part in PARTS if part not in ("training", "compile")],
        ["sd15"],
        [60, 40],
        [4096],
        "float32",
        {"sd15": [512], "sdxl": [1024], "pixart-sigma": [1024], "sd3-medium": [1024], "flux-dev": [1024]},
    ),
    "cuda": Defaults(
        [part for part in PARTS if part not in ("small", "training")],
        ["sd15", "sdxl"],
        [60, 40, 25],
        [1024, 4096, 16384],
        "float16",
        {
            "sd15": [512, 1024, 2048],
            "sdxl": [1024],
            "pixart-sigma": [1024, 2048],
            "sd3-medium": [1024],
            "flux-dev": [1024, 2048],
        },
    ),
}


def percentage(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 100:
        raise ValueError(f"expected a whole percentage from 1 to 100, got {text!r}")
    return int(text)


@dataclass(frozen=True)
class Benchmark:
    """What the command line asks for."""

    device: str = option("what is measured", "cpu", choices=list(DEFAULTS))
    parts: tuple[str, ...] = option("(default: all but training; CPU: no compile; GPU: no small)", (), choices=PARTS)
    model: tuple[str, ...] = option("(default: sd15; GPU: sd15 sdxl)", (), choices=list(MODELS))
    blocks: int | None = option("so many of a transformer's blocks (default: all)", None, checks.whole(1))
    dtype: str | None = option("of the steps (default: float32; GPU: float16)", None, choices=DTYPES)
    size: tuple[int, ...] = option(
        "pixels a side (default: 512, others than sd15 1024; GPU: sd15 at 512, 1024 and 2048)", (), checks.whole(64, 64)
    )
    keep: tuple[int, ...] = option(
        "percentages of the tokens kept; all but step and attention take the first (default: 60 40; GPU: 60 40 25)",
        (),
        percentage,
    )
    candidates: tuple[str, ...] = option("(default: all)", CANDIDATES, choices=CANDIDATES, nargs="*")
    tokens: tuple[int, ...] = option("of the clustering (default: 4096; GPU: 1024 4096 16384)", (), checks.whole(1))
    growth_tokens: tuple[int, ...] = option(
        "of the clustering whose growth is measured (default: 1024 to 16384)", GROWTH, checks.whole(1)
    )
    repeats: int = option("timings of every candidate", 3, checks.whole(1))
    dry_run: bool = switch(f"measure nothing: '{NOT_MEASURED}' in every cell")
    out: Path | None = option("a copy of what is printed", None, checks.file_to_write(".md", ".txt"))

    def __post_init__(self) -> None:
        """What was left open is what the device's defaults say."""
        for name in ("parts", "model", "keep", "tokens"):
            if not getattr(self, name):
                object.__setattr__(self, name, getattr(DEFAULTS[self.device], name))

    def settings(self) -> list[Setting]:
        """The networks whose steps are timed, the smallest pictures first."""
        defaults = DEFAULTS[self.device]
        models = [(model, size) for model in self.model for size in self.size or defaults.sizes[model]]
        dtype = getattr(torch, self.dtype or defaults.dtype)
        return [
            Setting(model, size, self.device, dtype, MODELS[model].blocks and self.blocks)
            for model, size in sorted(models, key=lambda each: each[1])
        ]
