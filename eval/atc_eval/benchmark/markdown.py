"""Markdown tables whose rows are measured while they are printed."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TextIO

import torch

Row = Sequence[str]


@dataclass(frozen=True)
class Table:
    title: str
    note: str
    columns: Row
    rows: Iterable[Row]

    def lines(self) -> Iterator[str]:
        """The table in GitHub's Markdown; it ends early where the GPU has too little memory."""
        yield from ["", f"## {self.title}", "", self.note, "", _line(self.columns), _line(["---"] * len(self.columns))]
        try:
            yield from map(_line, self.rows)
        except torch.OutOfMemoryError:
            yield _line(["out of memory", *[""] * (len(self.columns) - 1)])


def _line(cells: Row) -> str:
    return f"| {' | '.join(cells)} |"


def write(lines: Iterable[str], files: Iterable[TextIO]) -> None:
    """Write each line to all files at once, so that an interrupted run keeps what it has measured."""
    for line in lines:
        for file in files:
            print(line, file=file, flush=True)


def mebibytes(size: float) -> str:
    return f"{size / 2**20:.0f}"
