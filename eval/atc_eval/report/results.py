"""The results of an experiment: one for each method, and the study that they make up."""

import json
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pandas as pd
from tqdm import tqdm

from atc_eval.draw.images import PlannedImage
from atc_eval.draw.sampler import Times, read_records
from atc_eval.draw.sets import ImageSet, Sets
from atc_eval.method import Method
from atc_eval.score.scorer import Fidelity, Scorer, Scores
from atc_eval.score.statistics import Draws, Estimate


@dataclass(frozen=True)
class Result:
    """What was measured of one method."""

    method: Method
    images: ImageSet
    scores: Scores
    record: dict[str, Any]  # of the run that drew the images
    timing: dict[Hashable, float]  # median "seconds" per image, and "ratio" to the unmerged model's; or empty

    @property
    def seconds(self) -> float | None:
        return self.timing.get("seconds")

    @property
    def fidelity(self) -> Fidelity:
        """Fidelity of any set but the unmerged one."""
        assert self.scores.fidelity is not None
        return self.scores.fidelity

    @property
    def row(self) -> dict[str, Any]:
        """The figures, flat: an estimate becomes two columns."""
        named = {"method": self.method.label, "setting": self.method.setting}
        row: dict[str, Any] = named | {"seconds": self.seconds, "ratio": self.timing.get("ratio")}
        figures = vars(self.scores) | (vars(self.scores.fidelity) if self.scores.fidelity else {})
        for name, value in figures.items():
            if isinstance(value, Estimate):
                row |= {name: value.value, f"{name}_margin": value.margin}
            elif name not in ("fidelity", "psnr_of_each"):
                row[name] = value
        return row | {"peak_memory_bytes": self.record["peak_memory_bytes"]}


def score_sets(sets: Sets, scorer: Scorer, times: Times) -> list[Result]:
    timing = times.medians(sets).to_dict("index")
    return [
        Result(each, images, scorer(images), read_records(images.folder), timing.get(images.folder.name, {}))
        for each, images in tqdm(sets.items(), desc="scoring", unit="set")
    ]


@dataclass(frozen=True)
class Study:
    """Results with the conditions that they hold under."""

    results: Sequence[Result]  # the unmerged one first
    features: str  # network and resizing of all scores
    conditions: dict[str, str]
    commands: Sequence[str]  # command lines that made the results
    draws: Draws  # bootstrap draws of the images, [B, n]
    shown: Sequence[PlannedImage]
    is_papers_model: bool  # whether the paper's figures are worth comparing with these

    @property
    def unmerged(self) -> Result:
        return self.results[0]

    @property
    def others(self) -> Sequence[Result]:
        return self.results[1:]

    @property
    def is_timed(self) -> bool:
        return self.unmerged.seconds is not None

    @cached_property
    def frame(self) -> pd.DataFrame:
        """A row of figures for each result, the unmerged one first."""
        return pd.DataFrame([result.row for result in self.results])

    @property
    def json(self) -> str:
        rows = json.loads(self.frame.to_json(orient="records", double_precision=6))
        details = [{"config": each.method.json, "record": each.record} for each in self.results]
        results = [row | more for row, more in zip(rows, details, strict=True)]
        study = {"conditions": self.conditions, "commands": list(self.commands), "results": results}
        return json.dumps(study, indent=2)
