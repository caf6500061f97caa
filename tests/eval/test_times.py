"""Every configuration warms up before it is timed."""

from pathlib import Path
from typing import Any

import pytest
from accelerate import PartialState

from atc_diffusion import ATCConfig
from atc_eval.draw.images import PlannedImage
from atc_eval.draw.sampler import Sampler, Times
from atc_eval.draw.sampling import Sampling
from atc_eval.draw.sets import make_sets
from atc_eval.method import Method
from atc_eval.rivals import Rival


def test_every_method_warms_up_before_any_is_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[Method, int | None]] = []

    def draw(self: Sampler, method: Method, batch: Any, steps: int | None = None) -> list[Any]:
        drawn.append((method, steps))
        return []

    monkeypatch.setattr(Sampler, "draw", draw)
    methods = [Method(), Method(ATCConfig()), Method(rival=Rival("todo", 2))]
    images = [PlannedImage(0, 0, "ant", 0)]
    sampler = Sampler(Sampling(batch_size=1), PartialState(cpu=True))
    Times(tmp_path / "times.json").measure(sampler, make_sets(tmp_path, methods, images, {}), images, rounds=2)
    assert drawn == [*((each, 2) for each in methods), *((each, None) for each in methods + methods)]
