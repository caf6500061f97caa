"""The tables of the benchmark, in order, and the conditions that they hold under."""

import platform
from collections.abc import Iterator

import torch

from benchmark.arithmetic import arithmetic_table
from benchmark.choices import Benchmark
from benchmark.clustering import floor_table, growth_table, peers_table, small_table
from benchmark.models import MODELS
from benchmark.step import compiled_table, step_table
from benchmark.tables import Table
from benchmark.training import training_table
from machine import in_words, versions

PACKAGES = ("torch", "diffusers", "scipy", "fastcluster", "scikit-learn", "tomesd")


def tables(benchmark: Benchmark) -> Iterator[Table]:
    """The chosen tables, roughly from the fastest to the slowest."""
    first, repeats, device = benchmark.keep[0], benchmark.repeats, benchmark.device
    settings = benchmark.settings()
    if "arithmetic" in benchmark.parts:
        yield arithmetic_table(settings)
    if "small" in benchmark.parts:
        yield small_table(first, repeats)
    if "clustering" in benchmark.parts and device == "cuda":
        yield floor_table(benchmark.tokens, first, repeats)
    elif "clustering" in benchmark.parts:
        yield from (peers_table(num_tokens, first, repeats) for num_tokens in benchmark.tokens)
    if "growth" in benchmark.parts:
        yield growth_table(sorted(set(benchmark.growth_tokens)), first, repeats, device)
    if "step" in benchmark.parts:
        yield from (step_table(each, benchmark.keep, benchmark.candidates, repeats) for each in settings)
    if "training" in benchmark.parts:
        unets = [each for each in settings if not MODELS[each.model].blocks]
        yield from (training_table(each, benchmark.keep, repeats) for each in unets)
    if "compile" in benchmark.parts:
        yield compiled_table(settings[0], first, repeats)


def conditions(benchmark: Benchmark) -> str:
    processor = f"{torch.get_num_threads()} CPU threads ({platform.processor() or platform.machine()})"
    gpu = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}, " if benchmark.device == "cuda" else ""
    return f"{gpu}{processor}; {in_words(versions(PACKAGES))}."
