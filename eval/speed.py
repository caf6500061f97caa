"""Time clustering and the networks' steps, and compare with other packages: python eval/speed.py [--device cuda]

Prints Markdown tables. The networks have their full size and random weights: realistic times, but features unlike those
of images, so clustering may take more or fewer rounds. Methods take turns, and ratios are of medians of one run.

The defaults take a quarter of an hour on two CPU cores. Each table is printed as soon as it is measured; on a GPU, the
slowest ones (2048 x 2048 pixels, torch.compile) come last.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TextIO

from atc_diffusion.commands import check_file, check_number, one_sentence

with one_sentence("speed.py", extra="eval"):
    import torch
    from transformers.hf_argparser import HfArg

    from atc_eval.benchmark.clustering import CHANNELS, SMALL, engines_table
    from atc_eval.benchmark.full_size import MODELS
    from atc_eval.benchmark.lora_training import training_table
    from atc_eval.benchmark.step import METHODS, Setting, arithmetic_table, compiled_table, step_table
    from atc_eval.benchmark.timing import write
    from atc_eval.command_line import parse, parse_fraction, several
    from atc_eval.environment import device_name, in_words, versions

PACKAGES = ("torch", "diffusers", "scipy", "fastcluster", "scikit-learn", "tomesd")
PARTS = ("arithmetic", "small", "clustering", "step", "training", "compile")
DEFAULTS = {  # by device: parts, models, percentages of tokens kept, and dtype
    "cpu": (["arithmetic", "small", "clustering", "step"], ["sd15"], ["60", "40"], "float32"),
    "cuda": (["arithmetic", "step", "compile"], ["sd15", "sdxl"], ["60", "40", "25"], "float16"),
}


@dataclass(frozen=True)
class Benchmark:
    """The options of the command line."""

    device: Literal["cpu", "cuda"] = HfArg(default="cpu", help="device to time")
    parts: list[str] = several(
        [], "tables to measure (default: all but training; CPU: no compile; GPU: neither small nor clustering)", PARTS
    )
    model: list[str] = several([], "networks whose steps are timed (default: sd15; GPU: sd15 sdxl)", list(MODELS))
    blocks: int | None = HfArg(default=None, help="time only so many of a transformer's blocks (default: all)")
    dtype: Literal["float32", "float16", "bfloat16"] | None = HfArg(default=None, help="default: float32; GPU: float16")
    size: list[int] = several([], "pixels a side (default: 512, others than sd15 1024; GPU: sd15 at 512, 1024, 2048)")
    keep: list[str] = several([], "percent kept; all but step and training take one (default: 60 40; GPU: also 25)")
    method: list[str] = several(list(METHODS), "methods to time, besides the unmerged network", list(METHODS))
    tokens: list[int] = several([4096], "numbers of tokens to cluster beside other engines, on the CPU")
    repeats: int = HfArg(default=3, help="timings of every candidate")
    out: Path | None = HfArg(default=None, help="file for a copy of the output, .md or .txt")

    def __post_init__(self) -> None:
        for name, default in zip(("parts", "model", "keep", "dtype"), DEFAULTS[self.device], strict=True):
            object.__setattr__(self, name, getattr(self, name) or default)
        for size in self.size:
            check_number("--size", size, least=64, multiple=64)
        for number in self.tokens:
            check_number("--tokens", number, least=16)
        check_number("--blocks", self.blocks)
        check_number("--repeats", self.repeats)
        check_file("--out", self.out, ".md", ".txt")
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


KINDS = (Benchmark,)


def tables(benchmark: Benchmark) -> Iterator[Iterator[str]]:
    """The chosen tables, roughly from the fastest to the slowest."""
    first, repeats = benchmark.fractions[0], benchmark.repeats
    settings = benchmark.settings()
    if "arithmetic" in benchmark.parts:
        yield arithmetic_table(settings)
    if "small" in benchmark.parts:
        yield engines_table("Small problems: one clustering, or 16 in a batch", SMALL, first, repeats)
    if "clustering" in benchmark.parts:
        shapes = [(1, num_tokens, CHANNELS) for num_tokens in benchmark.tokens]
        yield engines_table("Large problems", shapes, first, repeats)
    if "step" in benchmark.parts:
        yield from (step_table(each, benchmark.fractions, benchmark.method, repeats) for each in settings)
    if "training" in benchmark.parts:
        unets = [each for each in settings if not MODELS[each.model].blocks]
        yield from (training_table(each, benchmark.fractions, repeats) for each in unets)
    if "compile" in benchmark.parts:
        yield compiled_table(settings[0], first, repeats)


def main(arguments: Sequence[str] | None = None) -> None:
    [benchmark] = parse(KINDS, __doc__, arguments)
    if benchmark.device == "cuda" and not torch.cuda.is_available():
        sys.exit("PyTorch finds no CUDA GPU here; run this on a machine that has one, or leave out --device cuda")
    with (
        one_sentence("speed.py", extra="eval", stopped="the measurements so far are printed above"),
        ExitStack() as stack,
    ):
        files: list[TextIO] = [sys.stdout]
        if benchmark.out:
            benchmark.out.parent.mkdir(parents=True, exist_ok=True)
            files.append(stack.enter_context(benchmark.out.open("w", encoding="utf-8")))
        write([f"{device_name(torch.device(benchmark.device))}; {in_words(versions(PACKAGES))}."], files)
        for lines in tables(benchmark):
            write(lines, files)


if __name__ == "__main__":
    main()
