"""Runs, moments and lanes: what is told from a timestep alone."""

import copy
import gc
import pickle

import pytest
import torch

from atc_diffusion.schedule import MAX_LANES, Moment, Run, Schedule, progress_by_value


@pytest.mark.parametrize("device", ["cpu", "meta"])  # tensors on "meta" have no values that could be read
@pytest.mark.parametrize("expand", [False, True])
def test_a_moment_is_an_entry_of_the_timesteps(device, expand):
    timesteps = torch.tensor([999, 400, 399, 1], device=device)
    entries = [entry[None].expand(3) if expand else entry for entry in timesteps]
    moments = [moment for entry in entries if (moment := Moment.of(entry))]
    assert [(moment.index, moment.count) for moment in moments] == [(0, 4), (1, 4), (2, 4), (3, 4)]
    assert [moment.progress() for moment in moments] == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert moments[0].progress(later=2) == pytest.approx(2 / 3)
    assert all(moment.timesteps is timesteps.untyped_storage() for moment in moments)


def test_a_slice_of_the_timesteps_keeps_its_place():
    timesteps = torch.arange(10)
    assert [moment.index for entry in timesteps[4:] if (moment := Moment.of(entry))] == [4, 5, 6, 7, 8, 9]


@pytest.mark.parametrize(
    "timestep", [900, 0.5, torch.tensor(900), torch.tensor([900, 400]), torch.arange(4)[2].clone(), torch.empty(0)]
)
def test_what_is_no_entry_is_no_moment(timestep):
    assert Moment.of(timestep) is None


def test_the_only_entry_of_a_one_step_schedule_is_a_moment():
    (entry,) = torch.tensor([999])
    assert Moment.of(entry) is not None


@pytest.mark.parametrize(
    ("timestep", "expected"),
    [(999, 0.001), (torch.tensor(250), 0.75), (0.0, 1.0), (2000, 0.0), (torch.empty((), device="meta"), None)],
)
def test_progress_by_value(timestep, expected):
    assert progress_by_value(timestep) == pytest.approx(expected)


def moments(count: int = 3) -> list[Moment]:
    return [moment for entry in torch.arange(count) if (moment := Moment.of(entry))]


def test_a_run_lasts_while_its_timesteps_rise():
    schedule, (first, second, third) = Schedule(), moments()
    run = schedule.run(first)
    assert schedule.run(first) is run
    assert schedule.run(third) is run
    run.lane(third.index)
    assert schedule.run(second) is not run


def test_runs_in_turn_are_told_apart_by_their_timesteps():
    schedule, one, other = Schedule(), moments(), moments()
    runs = [schedule.run(moment) for pair in zip(one, other, strict=True) for moment in pair]
    assert runs[0] is runs[2] is runs[4]
    assert runs[1] is runs[3] is runs[5]
    assert runs[0] is not runs[1]


def test_what_is_not_recognised_is_a_run_of_its_own():
    assert Schedule().run(None) is not Schedule().run(None)


def test_a_run_is_forgotten_with_its_timesteps():
    schedule = Schedule()
    timesteps = torch.arange(3)
    moment = Moment.of(timesteps[0])
    run = schedule.run(moment)
    kept = moments()
    schedule.run(kept[0])
    del timesteps, moment
    gc.collect()
    assert run not in [schedule.run(kept[0])]
    assert len(schedule._runs) == 1


def test_copies_begin_afresh():
    schedule, (first, *_) = Schedule(), moments()
    run = schedule.run(first)
    for other in (copy.deepcopy(schedule), pickle.loads(pickle.dumps(schedule))):
        assert other.run(first) is not run


def test_calls_at_one_moment_are_told_apart_by_their_order():
    run = Run()
    lanes = [run.lane(index) for index in (0, 0, 0, 1, 1, 2, 2, 2, 2)]
    assert lanes[0] is lanes[3] is lanes[5]
    assert lanes[1] is lanes[4] is lanes[6]
    assert lanes[2] is lanes[7]
    assert len({id(lane) for lane in lanes}) == 4


def test_a_loop_that_never_leaves_its_moment_keeps_a_bounded_memory():
    run = Run()
    lanes = [run.lane(0) for _ in range(2 * MAX_LANES)]
    again = [run.lane(1) for _ in range(2 * MAX_LANES)]
    assert sum(a is b for a, b in zip(lanes, again, strict=True)) == MAX_LANES
