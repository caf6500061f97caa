"""Markdown tables whose cells are measured while they are printed."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TextIO

import torch

NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Rows:
    """Rows that are measured together: their first cells, and what gives the other cells of each."""

    names: Sequence[Sequence[str]]
    measure: Callable[[], Sequence[Sequence[str]]]


@dataclass(frozen=True)
class Table:
    title: str
    note: str
    columns: Sequence[str]
    rows: Sequence[Rows]

    def lines(self, dry_run: bool = False) -> Iterator[str]:
        """The table in GitHub's Markdown; a dry run measures nothing and says so in every cell."""
        yield from ["", f"## {self.title}", "", self.note, "", _line(self.columns), _line(["---"] * len(self.columns))]
        for rows in self.rows:
            cells = self._all(rows, NOT_MEASURED) if dry_run else self._measure(rows)
            for name, values in zip(rows.names, cells, strict=True):
                yield _line([*name, *values])

    def _measure(self, rows: Rows) -> Sequence[Sequence[str]]:
        """A GPU that is too small for some rows still measures the others."""
        try:
            return rows.measure()
        except torch.OutOfMemoryError:
            return self._all(rows, "out of memory")

    def _all(self, rows: Rows, cell: str) -> list[list[str]]:
        return [[cell] * (len(self.columns) - len(name)) for name in rows.names]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def write(lines: Iterable[str], files: Iterable[TextIO]) -> None:
    """Each line goes to all files at once, so that a run that is stopped leaves what it has measured."""
    for line in lines:
        for file in files:
            print(line, file=file, flush=True)


def mebibytes(size: float) -> str:
    return f"{size / 2**20:.0f}"
