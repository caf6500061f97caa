"""Time the clustering and the networks' steps beside their peers: python eval/speed.py [--device cuda]

Prints Markdown tables, each with what it measured. The networks have their full size and random weights, which do for
timing, but their features are not those of images: clustering may take more or fewer rounds there. Ratios are of
medians from one run in which the candidates took turns.

The defaults take a quarter of an hour on two CPU cores. On a GPU they are all there is, and the tables that take
longest, of 2048 x 2048 pixels and of torch.compile, come last; each table is printed once it is measured.
"""

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TextIO

from arguments.door import door
from arguments.options import parse

with door("speed.py", extra="eval"):
    import torch

    from benchmark.choices import Benchmark
    from benchmark.parts import conditions, tables
    from benchmark.tables import write


def main(arguments: Sequence[str] | None = None) -> None:
    benchmark = parse(Benchmark, __doc__, arguments)
    if benchmark.device == "cuda" and not benchmark.dry_run and not torch.cuda.is_available():
        sys.exit("PyTorch finds no CUDA GPU here; run this where there is one, or add --dry-run for empty tables")
    with door("speed.py", extra="eval", stopped="what was measured is printed above"), ExitStack() as stack:
        files: list[TextIO] = [sys.stdout]
        if benchmark.out:
            benchmark.out.parent.mkdir(parents=True, exist_ok=True)
            files.append(stack.enter_context(benchmark.out.open("w", encoding="utf-8")))
        write([conditions(benchmark)], files)
        for table in tables(benchmark):
            write(table.lines(benchmark.dry_run), files)


if __name__ == "__main__":
    main()
