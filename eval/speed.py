"""Time clustering and the networks' steps, and compare with other packages: python eval/speed.py [--device cuda]

Prints Markdown tables. The networks have their full size and random weights: realistic times, but features unlike those
of images, so clustering may take more or fewer rounds. Methods take turns, and ratios are of medians of one run.

The defaults take a quarter of an hour on two CPU cores. Each table is printed as soon as it is measured; on a GPU, the
slowest ones (2048 x 2048 pixels, torch.compile) come last.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import TextIO

from atc_diffusion.commands import one_sentence

with one_sentence("speed.py", extra="eval"):
    import torch

    from atc_eval.benchmark.arithmetic import arithmetic_table
    from atc_eval.benchmark.choices import Benchmark
    from atc_eval.benchmark.clustering import growth_table, peers_table, small_table
    from atc_eval.benchmark.full_size import MODELS
    from atc_eval.benchmark.lora_training import training_table
    from atc_eval.benchmark.markdown import Table, write
    from atc_eval.benchmark.step import compiled_table, step_table
    from atc_eval.command_line import parse
    from atc_eval.environment import device_name, in_words, versions

KINDS = (Benchmark,)
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
        write([conditions(benchmark)], files)
        for table in tables(benchmark):
            write(table.lines(), files)


if __name__ == "__main__":
    main()
