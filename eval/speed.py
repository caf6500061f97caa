"""Time clustering and the networks' steps, and compare with other packages: python eval/speed.py [--device cuda]

Prints Markdown tables. The networks have their full size and random weights: realistic times, but features unlike those
of images, so clustering may take more or fewer rounds. Candidates take turns, and ratios are of medians of one run.

The defaults take a quarter of an hour on two CPU cores. Each table is printed as soon as it is measured; on a GPU, the
slowest ones (2048 x 2048 pixels, torch.compile) come last.
"""

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TextIO

from atc_diffusion.commands import one_sentence

with one_sentence("speed.py", extra="eval"):
    import torch

    from atc_eval.benchmark.choices import Benchmark
    from atc_eval.benchmark.markdown import write
    from atc_eval.benchmark.parts import conditions, tables
    from atc_eval.command_line import parse


def main(arguments: Sequence[str] | None = None) -> None:
    [benchmark] = parse([Benchmark], __doc__, arguments)
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
