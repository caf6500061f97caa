"""Moments, runs and sources: which clusters serve a call, told apart by what the call was given."""

import copy
import gc
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from atc_diffusion.inputs import Inputs, Sharing, changes
from atc_diffusion.moment import Moment, progress_by_value
from atc_diffusion.schedule import MAX_SOURCES, PATIENCE, Run, Schedule


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
    run = schedule.run(first, 0)
    assert schedule.run(first, 0) is run
    assert schedule.run(third, 0) is run
    assert schedule.run(second, 0) is not run


def test_timesteps_without_a_schedule_are_a_run_while_they_fall():
    schedule = Schedule()
    run = schedule.run(None, 900)
    assert schedule.run(None, torch.tensor([900, 400])) is run
    assert schedule.run(None, 700.5) is run
    assert schedule.run(None, 701) is not run


def test_runs_in_turn_are_told_apart_by_their_timesteps():
    schedule, one, other = Schedule(), moments(), moments()
    runs = [schedule.run(moment, 0) for pair in zip(one, other, strict=True) for moment in pair]
    assert runs[0] is runs[2] is runs[4]
    assert runs[1] is runs[3] is runs[5]
    assert runs[0] is not runs[1]


def shares(timesteps: list[object]) -> list[float]:
    """The shares of all steps but the first, whose length is unknown where the number of steps is."""
    schedule, found = Schedule(), []
    for timestep in timesteps:
        moment = Moment.of(timestep)
        run = schedule.run(moment, timestep)
        found.append(run.step(run.time, moment).share)
    return found[1:]


@pytest.mark.parametrize("as_numbers", [True, False])
@pytest.mark.parametrize("skipped", [0, 4])  # as image-to-image skips the first steps
def test_the_shares_of_all_steps_add_up_to_at_most_one(as_numbers, skipped):
    timesteps = torch.arange(1000, 0, -100)[skipped:]
    found = shares(timesteps.tolist() if as_numbers else list(timesteps))
    steps = len(timesteps) if as_numbers else 10
    assert found == pytest.approx([1 / steps] * (len(timesteps) - 1))


def test_threads_share_no_run():
    schedule, (first, *_) = Schedule(), moments()
    with ThreadPoolExecutor(1) as executor:
        for moment in (first, None):
            assert schedule.run(moment, 0) is not executor.submit(schedule.run, moment, 0).result()


def test_a_run_is_forgotten_with_its_timesteps():
    schedule = Schedule()
    timesteps = torch.arange(3)
    schedule.run(Moment.of(timesteps[0]), 0)
    del timesteps
    gc.collect()
    assert len(schedule._placed) == 0


def test_copies_begin_afresh():
    schedule, (first, *_) = Schedule(), moments()
    run = schedule.run(first, 0)
    for other in (copy.deepcopy(schedule), pickle.loads(pickle.dumps(schedule))):
        assert other.run(first, 0) is not run


def inputs(change: float = 0.0, seed: int = 0, **fixed: object) -> Inputs:
    """Latents that have changed by a share of their norm, and the text."""
    generator = torch.Generator().manual_seed(seed)
    latents, move = torch.randn(2, 1, 4, 8, 8, generator=generator)
    move *= change * latents.norm() / move.norm()
    return Inputs.of(latents + move, {"encoder_hidden_states": torch.ones(1, 5, 12), **fixed})


def test_the_change_is_that_of_the_item_that_moved_most():
    old = inputs()
    latents = torch.cat([inputs(0.1).moving[0], inputs(0.3).moving[0]])
    both = Inputs((latents,))
    assert changes(both, [Inputs((old.moving[0].repeat(2, 1, 1, 1),))]) == [pytest.approx(0.3)]


def test_channels_that_stay_do_not_dilute_the_change():
    mask = torch.full((1, 5, 8, 8), 7.0)
    new, old = (Inputs((torch.cat([x.moving[0], mask], dim=1),)) for x in (inputs(0.2), inputs()))
    assert changes(new, [old]) == [pytest.approx(0.2)]


def test_equal_inputs_have_not_changed():
    assert changes(Inputs((torch.zeros(1, 4, 8, 8),)), [Inputs((torch.zeros(1, 4, 8, 8),))]) == [0.0]


def test_what_a_controlnet_adds_moves_and_the_text_must_be_equal():
    residuals = {"down_block_additional_residuals": [torch.ones(1, 2, 8, 8), torch.ones(1, 2, 4, 4)]}
    moved = {"down_block_additional_residuals": [torch.ones(1, 2, 8, 8), 1.5 * torch.ones(1, 2, 4, 4)]}
    latents, text = torch.ones(1, 4, 8, 8), torch.ones(1, 5, 12)
    old = Inputs.of(latents, residuals | {"text": text})
    assert changes(Inputs.of(latents, moved | {"text": text}), [old]) == [pytest.approx(0.5)]
    assert changes(Inputs.of(latents, residuals | {"text": text + 1e-6}), [old]) == [torch.inf]


def run_at(*times: float) -> Run:
    run = Run()
    for time in times:
        run.advance(time)
    return run


def test_clusters_serve_until_the_latents_have_changed_by_more_than_the_threshold():
    run = run_at(0)
    clusters = run.clusters(inputs(), 0.15, False)
    assert run.clusters(inputs(0.14), 0.15, False) is clusters
    assert run.clusters(inputs(0.16), 0.15, False) is not clusters


@pytest.mark.parametrize(
    "other", [{"text": torch.zeros(1)}, {"scale": 0.5}, {"encoder_hidden_states": torch.zeros(1, 5, 12)}]
)
def test_clusters_serve_only_calls_of_the_same_conditions(other):
    run = run_at(0)
    assert run.clusters(inputs(**other), 0.15, False) is not run.clusters(inputs(), 0.15, False)


def test_pictures_at_one_moment_are_told_apart_by_content_in_any_order():
    run = run_at(0)
    clusters = [run.clusters(inputs(seed=seed), 0.15, False) for seed in range(5)]
    run.advance(1)
    for seed in (3, 0, 4, 1, 2):
        assert run.clusters(inputs(0.1, seed=seed), 0.15, False) is clusters[seed]


def test_a_threshold_of_zero_never_serves_again():
    run = run_at(0)
    assert run.clusters(inputs(), 0.0, False) is not run.clusters(inputs(), 0.0, False)


def test_inputs_changed_in_place_are_not_mistaken_for_what_they_were():
    run, first = run_at(0), inputs()
    clusters = run.clusters(first, 0.15, False)
    first.moving[0].mul_(2)
    assert run.clusters(first, 0.15, False) is not clusters


def test_clusters_wait_while_a_step_is_skipped_and_no_longer():
    run = run_at(0)
    clusters = run.clusters(inputs(), 0.15, False)
    run.advance(1)
    run.advance(PATIENCE)
    assert run.clusters(inputs(), 0.15, False) is clusters
    for time in range(PATIENCE + 1, 2 * PATIENCE + 2):
        run.advance(time)
    assert run.clusters(inputs(), 0.15, False) is not clusters


def test_a_loop_that_never_leaves_its_moment_keeps_a_bounded_memory():
    run = run_at(0)
    for seed in range(MAX_SOURCES + 10):
        run.clusters(inputs(seed=seed), 0.15, False)
    assert len(run._sources) == MAX_SOURCES


def test_items_of_equal_latents_share_the_clusters_of_the_last():
    a, b = torch.randn(2, 4, 8, 8)
    sharing = Sharing.of(torch.stack([a, b, a, a]))
    assert sharing is not None
    assert (sharing.clustered.tolist(), sharing.used.tolist()) == ([1, 3], [1, 0, 1, 1])
    tokens = torch.arange(8.0).view(8, 1, 1)  # two frames an item
    assert sharing.pick(tokens).flatten().tolist() == [2, 3, 6, 7]
    assert sharing.spread(sharing.pick(tokens)).flatten().tolist() == [6, 7, 2, 3, 6, 7, 6, 7]
    assert Sharing.of(torch.stack([a, b])) is None


def test_items_are_equal_only_if_all_channels_are():
    """As of an ensemble whose condition stands in the first channels."""
    latents = torch.randn(2, 8, 8, 8)
    latents[1, :4] = latents[0, :4]
    assert Sharing.of(latents) is None


def test_equal_latents_are_shared_from_the_second_moment():
    """At the first, different prompts of one seed have equal latents too."""
    run, batch = run_at(0), Inputs((inputs().moving[0].repeat(2, 1, 1, 1),))
    assert run.clusters(batch, 0.15, True).sharing is None
    run.advance(1)
    moved = Inputs((inputs(0.5).moving[0].repeat(2, 1, 1, 1),))
    assert run.clusters(moved, 0.15, True).sharing is not None
