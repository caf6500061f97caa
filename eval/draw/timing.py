"""Seconds per picture of each configuration, measured in turn, so that drifts of the machine's speed affect all."""

import time
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from tqdm import tqdm

from atc_diffusion.clustering import on_compilation
from draw.configuration import Configuration
from draw.pictures import Picture
from draw.sampler import Sampler
from files import read_json, write_json


class Times:
    """Rounds of one batch with each configuration, in a JSON file to which later runs add."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rounds: list[dict[str, float]] = read_json(path) if path.exists() else []

    def of(self, configurations: Sequence[Configuration]) -> pd.DataFrame:
        """Seconds per picture: a row for each round in which all `configurations` were timed, a column for each."""
        return pd.DataFrame(self.rounds, columns=[each.folder for each in configurations]).dropna()

    def medians(self, configurations: Sequence[Configuration]) -> pd.DataFrame:
        """Median "seconds", and median "ratio" to the unmerged model in the same round, by folder."""
        times = self.of(configurations)
        ratios = times.div(times[Configuration().folder], axis=0)
        return pd.DataFrame({"seconds": times.median(), "ratio": ratios.median()}).dropna()

    def measure(
        self, sampler: Sampler, configurations: Sequence[Configuration], pictures: Sequence[Picture], rounds: int
    ) -> None:
        """Add rounds until so many have all `configurations`; nothing else should be running."""
        missing = max(0, rounds - len(self.of(configurations)))
        size = sampler.sampling.batch_size
        with tqdm(total=missing * len(configurations), desc="timing", unit="batch", disable=not missing) as bar:
            for number in range(missing):
                batch = [pictures[(number * size + index) % len(pictures)] for index in range(size)]
                if number == 0:
                    warm_up(sampler, configurations, batch, bar)
                self.rounds.append({each.folder: self._time(sampler, each, batch, bar) for each in configurations})
                write_json(self.path, self.rounds)

    def _time(self, sampler: Sampler, configuration: Configuration, batch: Sequence[Picture], bar: tqdm) -> float:
        start = time.perf_counter()
        sampler.draw(configuration, batch)
        bar.update()
        return (time.perf_counter() - start) / sampler.sampling.batch_size


def warm_up(sampler: Sampler, configurations: Sequence[Configuration], batch: Sequence[Picture], bar: tqdm) -> None:
    """Draw two steps with each configuration, so that everything is compiled and tuned."""
    with on_compilation(lambda: bar.set_description("compiling (once)")):
        for configuration in configurations:
            bar.set_description("warming up")
            sampler.draw(configuration, batch, steps=2)
    bar.set_description("timing")
