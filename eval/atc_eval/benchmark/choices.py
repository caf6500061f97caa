"""The options of the benchmark; their defaults depend on the device."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers.hf_argparser import HfArg

from atc_eval.benchmark.full_size import MODELS
from atc_eval.benchmark.step import METHODS, Setting
from atc_eval.checks import check_new_file, check_number, parse_fraction

PARTS = ("arithmetic", "small", "clustering", "growth", "step", "training", "compile")
DEFAULTS: dict[str, dict[str, Any]] = {
    "cpu": {
        "parts": [part for part in PARTS if part not in ("training", "compile")],
        "model": ["sd15"],
        "keep": ["60", "40"],
        "tokens": [4096],
        "dtype": "float32",
    },
    "cuda": {
        "parts": [part for part in PARTS if part not in ("small", "clustering", "training")],
        "model": ["sd15", "sdxl"],
        "keep": ["60", "40", "25"],
        "tokens": [4096],
        "dtype": "float16",
    },
}


@dataclass(frozen=True)
class Benchmark:
    """The options of the command line."""

    device: Literal["cpu", "cuda"] = HfArg(default="cpu", help="device to time")
    parts: list[str] = HfArg(
        default_factory=list,
        metadata={"choices": PARTS},
        help="tables to measure (default: all but training; CPU: no compile; GPU: neither small nor clustering)",
    )
    model: list[str] = HfArg(
        default_factory=list,
        metadata={"choices": list(MODELS)},
        help="networks whose steps are timed (default: sd15; GPU: sd15 sdxl)",
    )
    blocks: int | None = HfArg(default=None, help="time only so many of a transformer's blocks (default: all)")
    dtype: Literal["float32", "float16", "bfloat16"] | None = HfArg(
        default=None, help="of the steps (default: float32; GPU: float16)"
    )
    size: list[int] = HfArg(
        default_factory=list,
        help="pixels a side (default: 512, others than sd15 1024; GPU: sd15 at 512, 1024 and 2048)",
    )
    keep: list[str] = HfArg(
        default_factory=list,
        help="percentages of the tokens kept; all parts but step and training take the first (default: 60 40; GPU: 25 "
        "too)",
    )
    method: list[str] = HfArg(
        default_factory=lambda: list(METHODS),
        metadata={"choices": list(METHODS)},
        help="methods whose steps are timed, besides the unmerged network (default: all)",
    )
    tokens: list[int] = HfArg(
        default_factory=list, help="numbers of tokens to cluster beside other engines, on the CPU (default: 4096)"
    )
    growth_tokens: list[int] = HfArg(
        default_factory=lambda: [2**power for power in range(10, 15)],
        help="numbers of tokens over which growth is measured (default: 1024 to 16384)",
    )
    repeats: int = HfArg(default=3, help="timings of every candidate")
    out: Path | None = HfArg(default=None, help="file for a copy of the output, .md or .txt")

    def __post_init__(self) -> None:
        for name, default in DEFAULTS[self.device].items():
            object.__setattr__(self, name, getattr(self, name) or default)
        for size in self.size:
            check_number("--size", size, least=64, multiple=64)
        for number in [*self.tokens, *self.growth_tokens]:
            check_number("--tokens and --growth-tokens", number)
        check_number("--blocks", self.blocks)
        check_number("--repeats", self.repeats)
        check_new_file("--out", self.out, ".md", ".txt")
        _ = self.fractions  # raises ValueError for percentages that do not fit

    @property
    def fractions(self) -> list[float]:
        """The fractions of tokens kept."""
        return [parse_fraction(text) for text in self.keep]

    def settings(self) -> list[Setting]:
        """The networks whose steps are timed, the smallest images first."""
        several = None if self.device == "cuda" else 1
        sizes = [(size, name) for name in self.model for size in self.size or MODELS[name].sizes[:several]]
        return [
            Setting(name, size, self.device, getattr(torch, str(self.dtype)), MODELS[name].blocks and self.blocks)
            for size, name in sorted(sizes, key=lambda each: each[0])
        ]
