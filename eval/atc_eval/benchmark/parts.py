"""The tables of the benchmark, in order, and the conditions that they hold under."""

from collections.abc import Iterator

import torch

from atc_eval.benchmark.arithmetic import arithmetic_table
from atc_eval.benchmark.choices import Benchmark
from atc_eval.benchmark.clustering import growth_table, peers_table, small_table
from atc_eval.benchmark.full_size import MODELS
from atc_eval.benchmark.lora_training import training_table
from atc_eval.benchmark.markdown import Table
from atc_eval.benchmark.step import compiled_table, step_table
from atc_eval.environment import device_name, in_words, versions

PACKAGES = ("torch", "diffusers", "scipy", "fastcluster", "scikit-learn", "tomesd")


def tables(benchmark: Benchmark) -> Iterator[Table]:
    """The chosen tables, roughly from the fastest to the slowest."""
    first, repeats, device = benchmark.fractions[0], benchmark.repeats, benchmark.device
    settings = benchmark.settings()
    if "arithmetic" in benchmark.parts:
        yield arithmetic_table(settings)
    if "small" in benchmark.parts:
        yield small_table(first, repeats)
    if "clustering" in benchmark.parts:
        yield from (peers_table(num_tokens, first, repeats) for num_tokens in benchmark.tokens)
    if "growth" in benchmark.parts:
        yield growth_table(sorted(set(benchmark.growth_tokens)), first, repeats, device)
    if "step" in benchmark.parts:
        yield from (step_table(each, benchmark.fractions, benchmark.method, repeats) for each in settings)
    if "training" in benchmark.parts:
        unets = [each for each in settings if not MODELS[each.model].blocks]
        yield from (training_table(each, benchmark.fractions, repeats) for each in unets)
    if "compile" in benchmark.parts:
        yield compiled_table(settings[0], first, repeats)


def conditions(benchmark: Benchmark) -> str:
    device = device_name(torch.device(benchmark.device))
    return f"{device}; {in_words(versions(PACKAGES))}."
