"""What forecasting promises: exact where the clean image moves evenly, images told apart, solvers recognised."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from atc_diffusion.adapters.noise import NoiseSchedule, diffusion, flow
from atc_diffusion.adapters.unet import UNetFamily
from atc_diffusion.calls.inputs import Clock, Inputs, changes
from atc_diffusion.calls.position import Position
from atc_diffusion.forecasting import Forecaster
from atc_diffusion.forecasting.deferred import DeferredTensor

STEPS = 20
TIMES = torch.linspace(1000, 50, STEPS).tolist()
LATENTS = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0)).half().float()  # of either precision


def position(step: int) -> Position:
    later = (*TIMES, 0.0)[step + 1]
    return Position(step, step, TIMES[step], later, STEPS, step == STEPS - 1)


def forecaster_of(schedule: NoiseSchedule, tolerance: float) -> Forecaster:
    return Forecaster(UNetFamily(), schedule, roughness=3.0, tolerance=tolerance)


def run(
    clean: Any,
    tolerance: float,
    noise: float = 0.0,
    schedule: Any = None,
    response: float = 0.0,
    edit: Any = lambda latents, later: latents,
    dtype: torch.dtype = torch.float32,
) -> tuple[list[float], Tensor, Tensor]:
    """Errors of the forecasts, by step, and the last latents, of a network that sees `clean(time)`, and without one.

    The network takes a part of the noise for image: `response`. Latents of the next step are edited.
    """
    schedule = schedule or flow("flow")
    forecaster = forecaster_of(schedule, tolerance)
    latents = expected = LATENTS
    added = torch.zeros_like(LATENTS)
    errors = []
    for step, time in enumerate(TIMES):
        now, later = schedule(time), schedule(position(step).next_time)
        decision = forecaster.decide(Inputs((latents.to(dtype),)), position(step))
        seen = clean(time) + response * added
        truth = now.output(latents, seen)
        if decision.output is not None:
            errors.append(float((decision.output[0] - truth).norm() / truth.norm()))
        returned = decision.output if decision.output is not None else decision.end((truth,))
        fresh = noise * torch.randn(LATENTS.shape, generator=torch.Generator().manual_seed(100 + step))
        latents = edit(sampled(latents, now.clean(latents, returned[0]), now, later) + fresh, later)
        expected = edit(sampled(expected, seen, now, later) + fresh, later)
        added = added + fresh / max(later.alpha, 1e-6)
    return errors, latents, expected


def sampled(latents: Tensor, clean: Tensor, now: Any, later: Any) -> Tensor:
    """One step of DDIM, or of Euler's method for rectified flow."""
    return later.alpha * clean + later.sigma * (latents - now.alpha * clean) / max(now.sigma, 1e-6)


@torch.no_grad()
@pytest.mark.parametrize("schedule", [flow("flow"), flow("reversed_flow"), diffusion(None)])
@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_a_clean_image_that_moves_evenly_is_forecast_exactly(schedule, noise):
    base, move = torch.randn(2, 2, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    errors, latents, expected = run(lambda time: base + time / 1000 * move, 0.3, noise, schedule)
    assert len(errors) >= 8
    assert max(errors) < 1e-3
    torch.testing.assert_close(latents, expected, rtol=0, atol=2e-3)


@torch.no_grad()
def test_what_the_network_takes_for_image_in_the_noise_that_a_sampler_adds_is_forecast():
    base, move = torch.randn(2, 2, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    errors, _, _ = run(lambda time: base + time / 1000 * move, 0.2, 0.05, response=0.3)
    assert len(errors) >= 8
    assert max(errors) < 0.02


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("columns", [4, 14])
def test_inpainting_is_forecast_like_any_run(columns, dtype):
    """Where it puts a noised picture back, latents follow from that alone, which the network sees nearly as it is."""
    base, move, picture = torch.randn(3, 2, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    base[..., :columns] = picture[..., :columns]

    def clean(time: float) -> Tensor:
        return base + 0.3 * math.sin(time / 200) * move

    def put_back(latents: Tensor, later: Any) -> Tensor:
        latents = latents.clone()
        latents[..., :columns] = (later.alpha * picture + later.sigma * LATENTS)[..., :columns]
        return latents.to(dtype).float()

    schedule = diffusion(None)
    errors, latents, expected = run(clean, 0.5, schedule=schedule, edit=put_back, dtype=dtype)
    assert len(errors) >= len(run(clean, 0.5, schedule=schedule)[0]) >= 4
    assert float((latents - expected).norm() / expected.norm()) < 0.02


@torch.no_grad()
def test_nothing_is_forecast_beyond_the_tolerance():
    images = torch.randn(STEPS + 1, 2, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    errors, latents, expected = run(lambda time: images[round(time / 50) % len(images)], 1e-9)
    assert not errors
    torch.testing.assert_close(latents, expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_making_up_for_skipped_steps_halves_their_error_at_least():
    """Of an image that does not move evenly."""
    base, move = torch.randn(2, 2, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    errors, latents, expected = run(lambda time: base + math.sin(time / 200) * move, 3.0)
    assert len(errors) >= 6
    assert float((latents - expected).norm() / expected.norm()) < 0.5 * max(errors)


@torch.no_grad()
def test_a_timestep_may_come_twice():
    """As in loops that go back over a step; the latents have moved, the timestep has not."""
    base, move = torch.randn(2, 2, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    schedule = flow("flow")
    forecaster, latents = forecaster_of(schedule, tolerance=3.0), LATENTS
    for step in range(STEPS):
        time, later = TIMES[step - step % 2], (*TIMES, 0.0)[step + 1 - (step + 1) % 2]
        decision = forecaster.decide(Inputs((latents,)), Position(step, step, time, later, STEPS, step == STEPS - 1))
        truth = schedule(time).output(latents, base + time / 1000 * move)
        returned = decision.output if decision.output is not None else decision.end((truth,))
        assert float((returned[0] - truth).norm() / truth.norm()) < 0.01
        latents = 0.99 * sampled(latents, schedule(time).clean(latents, returned[0]), schedule(time), schedule(later))


PARTS = torch.randn(3, 2, 4, 16, 16, generator=torch.Generator().manual_seed(2))  # what each begins as and moves by
WEIGHTS = torch.tensor([-6.0, 5.0, 2.0])  # of the parts, as guidance weighs them


@torch.no_grad()
def guided(calls: list[list[int]], has_conditions: bool, num_images: int = 1) -> list[set[bool]]:
    """Of each step, whether its calls were forecast; each call has some parts of guidance, for every image in turn."""
    schedule = flow("flow")
    forecaster, latents, forecast = forecaster_of(schedule, tolerance=0.5), LATENTS[:num_images], []
    for step, time in enumerate(TIMES):
        guided, decided = torch.zeros_like(latents), set()
        for parts in calls:
            given = latents.repeat_interleave(len(parts), dim=0)
            clean = torch.stack([PARTS[part, 0] + math.sin(time / 200) * PARTS[part, 1] for part in parts])
            clean = clean.repeat(num_images, 1, 1, 1)
            truth, marks = schedule(time).output(given, clean), torch.tensor(parts * num_images)
            channel = marks.reshape(-1, 1, 1, 1).expand(-1, 1, 16, 16)
            inputs = Inputs((torch.cat([given, channel], dim=1),) if has_conditions else (given,), (marks,))
            decision = forecaster.decide(inputs, position(step))
            decided.add(decision.output is not None)
            returned = decision.output if decision.output is not None else decision.end((truth,))
            seen = schedule(time).clean(given, returned[0]).unflatten(0, (num_images, len(parts)))
            guided += torch.einsum("p,mp...->m...", WEIGHTS[parts], seen)
        latents = sampled(latents, guided, schedule(time), schedule(position(step).next_time))
        forecast.append(decided)
    return forecast


@pytest.mark.parametrize("has_conditions", [False, True], ids=["same_channels", "other_channels"])
@pytest.mark.parametrize("calls", [[[0], [1], [2]], [[0], [1, 2]], [[0, 1], [2]]])
def test_parts_of_guidance_are_forecast_together_however_they_are_called(calls, has_conditions):
    expected = guided([[0, 1, 2]], has_conditions=False)
    assert {True} in expected
    assert guided(calls, has_conditions) == guided([[0, 1, 2]], has_conditions) == expected


def test_parts_of_guidance_are_recognised_image_by_image_too():
    assert guided([[0, 1, 2]], False, num_images=2) == guided([[0], [1], [2]], False, num_images=2)


@torch.no_grad()
@pytest.mark.parametrize("comes_first", [False, True])
@pytest.mark.parametrize("pause", [2, 3])
def test_a_part_of_guidance_that_pauses_is_forecast_with_the_others_or_they_are_computed(pause, comes_first):
    """It is called once in so many steps, and what it returned serves the steps after, too; at first, it jumps."""
    schedule, latents, images, forecast = flow("flow"), LATENTS, torch.zeros(2, *LATENTS.shape), []
    forecaster = forecaster_of(schedule, tolerance=3.0)
    for step, time in enumerate(TIMES):
        decided = set()
        for part in (1, 0) if comes_first else (0, 1):
            if part == 1 and step % pause:
                continue
            jump = 3 * (-1) ** (step // pause) if step < 8 else 0
            clean = PARTS[part, 0] + (jump if part else time / 1000) * PARTS[part, 1]
            truth = schedule(time).output(latents, clean)
            decision = forecaster.decide(Inputs((latents,), (torch.tensor(part),)), position(step))
            decided.add(decision.output is not None)
            returned = decision.output if decision.output is not None else decision.end((truth,))
            images[part] = schedule(time).clean(latents, returned[0])
        guided = 1.1 * images[0] - 0.1 * images[1]
        latents = sampled(latents, guided, schedule(time), schedule(position(step).next_time))
        forecast.append(decided)
    assert {True} in forecast
    assert {True, False} not in forecast


@torch.no_grad()
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_computed(value):
    def clean(time: float) -> Tensor:
        image = torch.ones(2, 4, 16, 16)
        image[1] = value if time < 600 else 1.0
        return image

    errors, *_ = run(clean, 1e9)
    assert len(errors) <= 6  # until then, and the call before the change is seen


@pytest.mark.parametrize("last", [0.3, 0.2, 1.5])
def test_numbers_that_tell_the_time_are_conditions_until_they_have_moved_twice_and_when_they_stop_or_jump(last):
    clock, latents = Clock(), torch.zeros(1, 4, 8, 8)
    given = [Inputs((latents,), settings=(0.5, progress)) for progress in (0.0, 0.1, 0.2, 0.3, last)]
    seen = [clock.without_time(inputs, step).settings for step, inputs in enumerate(given)]
    assert seen == [(0.5, 0.0), (0.5, 0.1), (0.5, "time"), (0.5, "time"), (0.5, last)]


def test_numbers_of_numpy_and_tensors_without_dimensions_are_compared():
    latents, others = torch.zeros(1, 4, 8, 8), {"scale": np.float32(0.5), "label": torch.tensor(3)}
    inputs = [Inputs.of(latents, (torch.tensor(residual),), others) for residual in (1.0, 1.0, 2.0)]
    assert inputs[0].settings == (1, "scale", 0.5, "label")
    assert changes(inputs[0], inputs[1:]) == [0.0, math.inf]


def deferred(value: float, calls: list[float]) -> DeferredTensor:
    def make() -> Tensor:
        calls.append(value)
        return torch.full((2, 3), value)

    return DeferredTensor(torch.empty(2, 3, device="meta"), torch.device("cpu"), make)


def test_what_is_put_off_is_made_when_it_is_read_and_sums_are_put_off_too():
    calls: list[float] = []
    x: Tensor = deferred(1.0, calls)
    y = deferred(2.0, calls)
    x += y
    scaled = x * 2.0
    assert scaled.shape == (2, 3)
    assert not calls
    assert torch.equal(scaled + 0 * torch.ones(2, 3), torch.full((2, 3), 6.0))
    assert calls == [1.0, 2.0]
    x.mul_(torch.full((2, 3), 10.0))
    assert torch.equal(x + torch.zeros(2, 3), torch.full((2, 3), 30.0))
    assert torch.equal(scaled + torch.zeros(2, 3), torch.full((2, 3), 6.0))
