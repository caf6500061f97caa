"""What the experiment found: one result for every configuration, and the study that they make up."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from configurations import Configuration
from pictures import Picture, PictureSet
from scores import Draws, Estimate, Fidelity, Scores


@dataclass(frozen=True)
class Result:
    """One configuration: its pictures, their scores, and what generating them took."""

    configuration: Configuration
    pictures: PictureSet
    scores: Scores
    record: dict[str, Any]

    @property
    def label(self) -> str:
        return self.configuration.label

    @property
    def keep(self) -> float:
        return self.configuration.keep

    @property
    def fidelity(self) -> Fidelity:
        """Nearness to the unmerged set, for any other set."""
        if self.scores.fidelity is None:
            raise ValueError("the unmerged set is what fidelity is measured against")
        return self.scores.fidelity

    @property
    def row(self) -> dict[str, Any]:
        """The figures, flat: an estimate becomes two columns."""
        figures = vars(self.scores) | (vars(self.scores.fidelity) if self.scores.fidelity else {})
        timing = {name: self.record[name] for name in ("seconds_per_picture", "peak_memory_bytes")}
        row: dict[str, Any] = {"label": self.label, "keep": self.keep}
        for name, value in (figures | timing).items():
            row |= _columns(name, value)
        return row


@dataclass(frozen=True)
class Study:
    """Results with the conditions that they hold under.

    Attributes:
        results: the unmerged one first.
        features: the network and the resizing that all scores are by.
        conditions: name and value of each condition, in words.
        commands: the command lines that made the results.
        draws: the bootstrap draws `[B, n]` of the pictures.
        shown: pictures to show.
        is_papers_model: whether the paper's figures are worth setting beside these.
    """

    results: Sequence[Result]
    features: str
    conditions: dict[str, str]
    commands: Sequence[str]
    draws: Draws
    shown: Sequence[Picture]
    is_papers_model: bool

    @property
    def unmerged(self) -> Result:
        return self.results[0]

    @property
    def merged(self) -> Sequence[Result]:
        return self.results[1:]

    @property
    def is_timed(self) -> bool:
        """Whether any set tells its time: one batch is all warm-up."""
        return any(result.record["seconds_per_picture"] is not None for result in self.merged)

    @property
    def keeps(self) -> list[float]:
        """The shares kept, in percent, from 100 down."""
        return sorted({result.keep for result in self.results}, reverse=True)

    @property
    def lines(self) -> dict[str, dict[float, Result]]:
        """The results of every way of merging, by share kept; at 100 % all have the unmerged one."""
        lines: dict[str, dict[float, Result]] = {result.label: {100.0: self.unmerged} for result in self.merged}
        for result in self.merged:
            lines[result.label][result.keep] = result
        return lines or {self.unmerged.label: {100.0: self.unmerged}}

    @property
    def json(self) -> dict[str, Any]:
        rows = [result.row | result.record | {"configuration": result.configuration.json} for result in self.results]
        return {"conditions": self.conditions, "commands": list(self.commands), "results": rows}

    @property
    def csv(self) -> str:
        rows = [result.row | {"features": self.features} for result in self.results]
        file = io.StringIO()
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return file.getvalue()


def _columns(name: str, value: object) -> dict[str, Any]:
    if isinstance(value, Estimate):
        return {name: value.value, f"{name}_margin": value.margin}
    return {} if name in ("fidelity", "psnr_of_each") else {name: value}
