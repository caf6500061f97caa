"""Seconds per image of each method, measured in turn, so that drifts of the machine's speed affect all."""

import time
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from tqdm import tqdm

from atc_diffusion.clustering import on_compilation
from atc_eval.draw.images import PlannedImage
from atc_eval.draw.sampler import Sampler
from atc_eval.draw.sets import Sets
from atc_eval.files import read_json, write_json
from atc_eval.method import Method


class Times:
    """Rounds of one batch with each method, in a JSON file to which later runs add; keys are names of sets' folders."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rounds: list[dict[str, float]] = read_json(path) if path.exists() else []

    def of(self, sets: Sets) -> pd.DataFrame:
        """Seconds per image: a row for each round in which all `sets` were timed, a column for each."""
        return pd.DataFrame(self.rounds, columns=[each.folder.name for each in sets.values()]).dropna()

    def medians(self, sets: Sets) -> pd.DataFrame:
        """Median "seconds", and median "ratio" to the unmerged model in the same round, by folder's name."""
        times = self.of(sets)
        ratios = times.div(times[sets[Method()].folder.name], axis=0)
        return pd.DataFrame({"seconds": times.median(), "ratio": ratios.median()}).dropna()

    def measure(self, sampler: Sampler, sets: Sets, images: Sequence[PlannedImage], rounds: int) -> None:
        """Add rounds until so many have all `sets`; nothing else should be running."""
        missing = max(0, rounds - len(self.of(sets)))
        size = sampler.sampling.batch_size
        with tqdm(total=missing * len(sets), desc="timing", unit="batch", disable=not missing) as bar:
            for number in range(missing):
                batch = [images[(number * size + index) % len(images)] for index in range(size)]
                if number == 0:
                    warm_up(sampler, list(sets), batch, bar)
                times = {drawn.folder.name: self._time(sampler, each, batch, bar) for each, drawn in sets.items()}
                self.rounds.append(times)
                write_json(self.path, self.rounds)

    def _time(self, sampler: Sampler, method: Method, batch: Sequence[PlannedImage], bar: tqdm) -> float:
        start = time.perf_counter()
        sampler.draw(method, batch)
        bar.update()
        return (time.perf_counter() - start) / sampler.sampling.batch_size


def warm_up(sampler: Sampler, methods: Sequence[Method], batch: Sequence[PlannedImage], bar: tqdm) -> None:
    """Draw two steps with each method, so that everything is compiled and tuned."""
    with on_compilation(lambda: bar.set_description("compiling (once)")):
        for method in methods:
            bar.set_description("warming up")
            sampler.draw(method, batch, steps=2)
    bar.set_description("timing")
