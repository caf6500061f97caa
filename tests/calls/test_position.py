"""Where in a run a call stands."""

import gc
import math
import weakref

import pytest
import torch

from atc_diffusion.calls.position import Entry
from atc_diffusion.merging.runs import Runs, locate


@pytest.mark.parametrize("expand", [False, True])
def test_an_entry_of_falling_timesteps_is_located(expand):
    timesteps = torch.tensor([999, 400, 399, 1])
    entries = [Entry.of(entry[None].expand(3) if expand else entry) for entry in timesteps]
    assert [(entry.index, entry.values) for entry in entries if entry] == [(i, (999, 400, 399, 1)) for i in range(4)]
    assert entries[2] is not None
    assert entries[2].progress() == pytest.approx(2 / 3)
    assert entries[2].next_time == 1


@pytest.mark.parametrize(
    "timestep", [900, torch.tensor(900), torch.tensor([400, 900, 7])[1], torch.arange(8).flip(0).clone()[3].clone()]
)
def test_what_is_in_no_order_is_no_entry(timestep):
    assert Entry.of(timestep) is None


def test_timesteps_of_a_batch_in_training_tell_nothing():
    assert locate(torch.tensor([900, 400])[1]) == (None, 400.0)


def positions(times: list[float]) -> list[tuple[float, bool]]:
    """The expected number of steps, and whether each step may be the last one."""
    runs = Runs()
    found = [runs.at(None, time).advance(None, time) for time in times]
    return [(position.count, position.is_last) for position in found]


@pytest.mark.parametrize("steps", [10, 20, 50])
@pytest.mark.parametrize("leading", [True, False])
def test_the_number_of_steps_is_expected_from_the_pace(steps, leading):
    times = torch.linspace(1000, 1000 / steps, steps) - leading * 1000 / steps
    counts = [count for count, _ in positions(times.tolist())]
    assert math.isnan(counts[0])
    assert counts[1:] == pytest.approx([steps] * (steps - 1), abs=0.1)


def test_steps_that_grow_are_expected_to_grow():
    """As with the shifted timesteps of Flux: ten steps begin as slowly as thirty even ones."""
    shift = 3.0
    sigmas = torch.linspace(1, 0.1, 10)
    counts = [count for count, _ in positions((1000 * shift * sigmas / (1 + (shift - 1) * sigmas)).tolist())]
    assert all(count < 20 for count in counts[3:])


def test_a_timestep_that_goes_back_begins_a_run():
    runs = Runs()
    first = runs.at(None, 900)
    first.advance(None, 900)
    assert runs.at(None, 900) is first
    assert runs.at(None, 700) is first
    first.advance(None, 700)
    assert runs.at(None, 701) is not first


@torch.no_grad()
def test_a_run_is_forgotten_with_its_timesteps():
    runs, forgotten = Runs(), []
    for start in (900, 901):
        timesteps = torch.linspace(start, 0, 10)
        run = runs.at(*locate(timesteps[0]))
        run.advance(*locate(timesteps[0]))
        forgotten.append(weakref.ref(run))
        del run, timesteps
    gc.collect()
    assert forgotten[0]() is None


@torch.no_grad()
def test_timesteps_that_are_copied_at_every_step_make_one_run():
    runs, timesteps = Runs(), torch.arange(900, 0, -100)
    made = []
    for step in [*range(9), *range(9)]:
        timestep = timesteps.float()[step]
        entry, time = locate(timestep)
        run = runs.at(entry, time)
        made.append((run, run.advance(entry, time).passed))
    assert [passed for _, passed in made] == [*range(9), *range(9)]
    assert len({id(run) for run, _ in made}) == 2
