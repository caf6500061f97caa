"""Seconds per picture of every way to draw, measured in turn, so that a change of the machine's speed meets all."""

import json
import time
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from configurations import Configuration
from generate import Sampler
from pictures import Picture, write_atomically
from tqdm import tqdm


class Times:
    """Rounds of one batch with each configuration, in a JSON file that later runs add to."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rounds: list[dict[str, float]] = json.loads(path.read_text()) if path.exists() else []

    def of(self, configurations: Sequence[Configuration]) -> pd.DataFrame:
        """Seconds per picture: a row for every round in which all `configurations` were timed, a column for each."""
        return pd.DataFrame(self.rounds, columns=[each.folder for each in configurations]).dropna()

    def measure(
        self, sampler: Sampler, configurations: Sequence[Configuration], pictures: Sequence[Picture], rounds: int
    ) -> None:
        """Add rounds until there are as many that have all `configurations`; nothing else should be running."""
        missing = max(0, rounds - len(self.of(configurations)))
        size = sampler.sampling.batch_size
        with tqdm(total=missing * len(configurations), desc="timing", unit="batch", disable=not missing) as bar:
            for number in range(missing):
                batch = [pictures[(number * size + index) % len(pictures)] for index in range(size)]
                if number == 0:
                    warm_up(sampler, configurations, batch)
                self.rounds.append({each.folder: self._time(sampler, each, batch, bar) for each in configurations})
                write_atomically(self.path, json.dumps(self.rounds, indent=1).encode())

    def _time(self, sampler: Sampler, configuration: Configuration, batch: Sequence[Picture], bar: tqdm) -> float:
        start = time.perf_counter()
        sampler.draw(configuration, batch)
        bar.update()
        return (time.perf_counter() - start) / len(batch)


def warm_up(sampler: Sampler, configurations: Sequence[Configuration], batch: Sequence[Picture]) -> None:
    """Two steps with each configuration, for what is compiled or tuned at its first call; on a CPU that is little."""
    for configuration in configurations[:1] if sampler.state.device.type == "cpu" else configurations:
        sampler.draw(configuration, batch, steps=2)


def medians(times: pd.DataFrame) -> pd.DataFrame:
    """Median seconds and the median of their ratio to the unmerged model's in the same round, by configuration.

    Empty without a round.
    """
    ratios = times.div(times[Configuration().folder], axis=0)
    return pd.DataFrame({"seconds": times.median(), "ratio": ratios.median()}).dropna()
