"""Rivals: each changes the images of a real pipeline, and leaves no trace."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from atc_diffusion import ATCConfig
from atc_eval.method import Method
from atc_eval.rivals import Rival
from atc_eval.skipped_steps import Spectrum


@pytest.fixture
def pipe(model: Path) -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(model, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: Callable[..., Any], steps: int = 4) -> np.ndarray[Any, Any]:
    generator = torch.Generator().manual_seed(0)
    return pipe("ant", num_inference_steps=steps, generator=generator, output_type="np").images


RIVALS = ["steps:0.5", "todo:2", "pooled:2", "tomesd:50", "deepcache:2", "pab:2", "spectrum:0.75", "easycache:0.5"]


@pytest.mark.parametrize("text", RIVALS)
def test_a_rival_changes_the_image_and_leaves_no_trace(pipe: StableDiffusionPipeline, text: str) -> None:
    before = draw(pipe, steps=8)
    with Rival.parse(text).applied(pipe) as rival:
        first = draw(rival, steps=8)
    with Rival.parse(text).applied(pipe) as rival:
        assert np.array_equal(draw(rival, steps=8), first)
    assert not np.array_equal(first, before)
    assert np.array_equal(draw(pipe, steps=8), before)


def test_fewer_steps_is_the_pipeline_with_fewer_steps(pipe: StableDiffusionPipeline) -> None:
    with Rival("steps", 0.5).applied(pipe) as rival:
        assert np.array_equal(draw(rival), draw(pipe, steps=2))


class Line(torch.nn.Module):
    """A UNet whose last layers change nothing, and get a line over the steps."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_norm_out, self.conv_act, self.conv_out = (torch.nn.Identity() for _ in range(3))
        self.computed: list[int] = []

    def forward(self, step: int, return_dict: bool = True) -> tuple[Tensor]:
        self.computed.append(step)
        return (self.conv_out(self.conv_act(self.conv_norm_out(line(step)))),)


def line(step: int) -> Tensor:
    return torch.tensor([[1.0 + step, 20.0 - 2 * step]])


def test_spectrum_skips_more_and_more_steps_and_forecasts_a_line() -> None:
    """One step on, that is: there the ridge costs less than half a step, and further on more and more."""
    unet = Line()
    spectrum = Spectrum(unet, 0.75)
    for _ in range(2):
        spectrum.start(num_steps=20)
        outputs = [unet(step, return_dict=False)[0] for step in range(20)]
        for step in (5, 7, 9, 12):
            torch.testing.assert_close(outputs[step], line(step), rtol=0, atol=0.8)
    spectrum.remove()
    assert unet.computed == [0, 1, 2, 3, 4, 6, 8, 11, 15] * 2
    assert "forward" not in vars(unet)


def first_keys(pipe: Callable[..., Any], projection: torch.nn.Module) -> Tensor:
    """What the first call of `projection` gives while an image is drawn, as `[B, C, side, side]`."""
    seen: list[Tensor] = []
    handle = projection.register_forward_hook(lambda module, args, output: seen.append(output))
    draw(pipe, steps=1)
    handle.remove()
    side = round(seen[0].shape[1] ** 0.5)
    return seen[0].transpose(1, 2).unflatten(2, (side, side))


def test_todo_keeps_one_key_of_each_cell_and_pooling_their_mean(pipe: StableDiffusionPipeline) -> None:
    to_k = pipe.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1.to_k
    keys = first_keys(pipe, to_k)
    cells = keys.unflatten(2, (-1, 2)).unflatten(4, (-1, 2))
    with Rival("todo", 2).applied(pipe) as rival:
        torch.testing.assert_close(first_keys(rival, to_k), cells[:, :, :, 0, :, 0])
    with Rival("pooled", 2).applied(pipe) as rival:
        torch.testing.assert_close(first_keys(rival, to_k), cells.mean(dim=(3, 5)))


def test_tomesd_does_not_depend_on_the_global_random_state_or_change_it(pipe: StableDiffusionPipeline) -> None:
    images = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        with Rival("tomesd", 50).applied(pipe) as rival:
            images.append(draw(rival))
        assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(images[0], images[1])


def test_forecasting_alone_changes_the_image_and_leaves_no_trace(pipe: StableDiffusionPipeline) -> None:
    before = draw(pipe, steps=20)
    with Method(ATCConfig(r=1.0, forecast_tolerance=1e9)).applied(pipe) as forecasting:
        assert not np.array_equal(draw(forecasting, steps=20), before)
    assert np.array_equal(draw(pipe, steps=20), before)


def test_merging_works_together_with_a_rival(pipe: StableDiffusionPipeline) -> None:
    merge, rival = ATCConfig(r=0.5), Rival("deepcache", 2)
    images = []
    for way in (Method(merge), Method(rival=rival), Method(merge, rival)):
        with way.applied(pipe) as drawing:
            images.append(draw(drawing))
    assert not np.array_equal(images[2], images[0])
    assert not np.array_equal(images[2], images[1])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps", "written with its strength, such as steps:0.7, got 'steps'"),
        ("cache:2", "one of steps, todo, .* got 'cache'"),
        ("steps:14", "steps takes a number from 0.01 to 0.99, got 14"),
        ("todo:1", "todo takes a whole number from 2 to 64, got 1"),
        ("deepcache:2.5", "deepcache takes a whole number .* got 2.5"),
        ("tomesd:10", "tomesd takes a number from 25 to 99, got 10"),
    ],
)
def test_a_rival_that_does_not_fit_is_one_sentence(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Rival.parse(text)
