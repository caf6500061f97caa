"""Every configuration warms up before it is timed."""

from pathlib import Path
from typing import Any

import pytest
from accelerate import PartialState

from atc_diffusion import ATCConfig
from draw.configuration import Configuration
from draw.pictures import Picture
from draw.pipeline import Sampling
from draw.rivals import Rival
from draw.sampler import Sampler
from draw.timing import Times


def test_every_configuration_warms_up_before_any_is_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[Configuration, int | None]] = []

    def draw(self: Sampler, configuration: Configuration, batch: Any, steps: int | None = None) -> list[Any]:
        drawn.append((configuration, steps))
        return []

    monkeypatch.setattr(Sampler, "draw", draw)
    ways = [Configuration(), Configuration(ATCConfig()), Configuration(rival=Rival("todo", 2))]
    sampler = Sampler(Sampling(batch_size=1), PartialState(cpu=True))
    Times(tmp_path / "times.json").measure(sampler, ways, [Picture(0, 0, "ant", 0)], rounds=2)
    assert drawn == [*((way, 2) for way in ways), *((way, None) for way in ways + ways)]
