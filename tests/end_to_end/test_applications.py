"""Applications that build on diffusers: their loops are as without a patch, reuse clusters, and are forecast."""

import copy
import types
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor

from atc_diffusion import ATCConfig, apply_patch, load_pipeline, remove_patch, summary
from atc_diffusion.testing import UNET
from tests.helpers.applications import LOOPS, Loop, sd_next
from tests.helpers.drawing import PARTS
from tests.helpers.forecasting import FORECAST, forecast_steps
from tests.helpers.loops import LAYERS, counts, embedding, sample
from tests.helpers.tiny_pipelines import EMOJI

STEPS = 20
CLUSTERED = {  # at most, of how many calls
    "invoke_ai": (18, 20),
    "invoke_ai_in_turn": (20, 40),
    "multi_diffusion": (36, 40),
    "k_diffusion": (18, 20),
    "k_diffusion_heun": (20, 39),
    "sd_next": (18, 20),
    "inpainting": (18, 20),
    "stream_diffusion": (10, 20),
}
FORECAST_LOOPS = {"invoke_ai_in_turn": 4, "multi_diffusion": 3, "sd_next": 4, "inpainting": 4}  # the fewest skipped
BOTH = ATCConfig(r=0.5, forecast_tolerance=1e9)

loops = pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS)


@pytest.fixture
def pipe(components: dict[str, Any]) -> Any:
    return StableDiffusionPipeline(**components, **PARTS)


@torch.no_grad()
def draw(pipe: Any, loop: Loop, steps: int = STEPS, seed: int = 0) -> Tensor:
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
    return loop(pipe, latents, embedding(2), steps)


def error(x: Tensor, expected: Tensor) -> float:
    return float((x - expected).norm() / expected.norm())


@loops
def test_identity_settings_change_no_bit(pipe, loop):
    expected = draw(pipe, loop, 4)
    assert torch.equal(draw(apply_patch(pipe, r=1, r_keys=1), loop, 4), expected)
    assert not torch.equal(draw(apply_patch(pipe, r=0.5), loop, 4), expected)
    assert torch.equal(draw(remove_patch(pipe), loop, 4), expected)


@loops
def test_clusters_are_reused_at_less_than_half_the_error_of_merging(pipe, loop):
    unmerged = draw(pipe, loop)
    most, calls = CLUSTERED[loop.__name__]
    apply_patch(pipe.unet, r=0.5, recluster_threshold=0)
    exact = draw(pipe, loop)
    assert counts(pipe) == [calls] * LAYERS
    apply_patch(pipe.unet, r=0.5)
    reused = draw(pipe, loop)
    assert max(counts(pipe)) <= most
    assert error(reused, exact) < error(exact, unmerged) / 2


@pytest.fixture(scope="module")
def emoji() -> Iterator[tuple[Any, Tensor]]:
    """The bundled model, and what it is asked to draw."""
    pipe: Any = load_pipeline(str(EMOJI), torch.float32)
    with torch.no_grad():
        conditional, unconditional = pipe.encode_prompt("red apple", "cpu", 1, True)
    yield pipe, torch.cat([unconditional, conditional])
    remove_patch(pipe)


@torch.no_grad()
def forecast_error(emoji: tuple[Any, Tensor], model: Any, loop: Loop, steps: int) -> float:
    pipe, text = emoji
    latents = torch.randn(1, 4, 12, 12, generator=torch.Generator().manual_seed(0))
    expected = loop(remove_patch(pipe), latents, text, steps)
    apply_patch(model, ATCConfig.forecast())
    return error(loop(pipe, latents, text, steps), expected)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "fewest"), FORECAST_LOOPS.items(), ids=FORECAST_LOOPS)
def test_forecasts_stay_close(emoji, name, fewest):
    pipe, _ = emoji
    assert forecast_error(emoji, pipe, LOOPS[name], STEPS) < 0.03
    assert len(forecast_steps(pipe)) >= fewest


def test_forecasts_stay_close_where_the_pace_alone_tells_how_many_steps_there_are(emoji):
    pipe, _ = emoji
    assert forecast_error(emoji, pipe.unet, LOOPS["k_diffusion"], 30) < 0.03
    assert forecast_steps(pipe)


def test_samplers_that_call_twice_a_step_are_computed(pipe):
    """Also where the timesteps are not known to come in pairs."""
    expected = draw(pipe, LOOPS["k_diffusion_heun"], 30)
    apply_patch(pipe.unet, FORECAST)
    assert torch.equal(draw(pipe, LOOPS["k_diffusion_heun"], 30), expected)


def test_frames_of_a_stream_are_all_computed(pipe):
    expected = draw(pipe, LOOPS["stream_diffusion"])
    apply_patch(pipe, FORECAST)
    assert torch.equal(draw(pipe, LOOPS["stream_diffusion"]), expected)
    assert "none of 1 step forecast" in str(summary(pipe))  # the timesteps never fall


def test_concurrent_requests_share_a_network(pipe):
    """As `RequestScopedPipeline` does: a shallow copy of the pipeline for each, with a new scheduler."""
    apply_patch(pipe, BOTH)

    def request(seed: int) -> Tensor:
        scoped = copy.copy(pipe)
        scoped.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
        return draw(scoped, sd_next, STEPS + 2 * seed, seed)

    alone = [request(seed) for seed in range(2)]
    assert forecast_steps(pipe)
    with ThreadPoolExecutor(2) as executor:
        together = list(executor.map(request, range(2)))
    assert all(map(torch.equal, together, alone))


class RegionalAttnProcessor(AttnProcessor2_0):  # type: ignore[misc]  # diffusers is not annotated
    """An application's own, for prompts of regions: it takes a further argument."""

    def __call__(self, *args: Any, percent_through: float = 0.0, **kwargs: Any) -> Tensor:
        return super().__call__(*args, **kwargs)


@torch.no_grad()
def exact_steps(unet: Any, steps: range) -> list[int]:
    """Those whose output is that of an unpatched network, in a run with an application's processors at `steps`."""
    ordinary, plain, exact = unet.attn_processors, remove_patch(copy.deepcopy(unet)), []
    for step in range(STEPS):
        unet.set_attn_processor(RegionalAttnProcessor() if step in steps else dict(ordinary))
        call = (1 + step / 100) * sample(), torch.tensor([950 - 40 * step]), embedding()
        given = {"cross_attention_kwargs": {"percent_through": step / STEPS}}
        if torch.equal(unet(*call, **given).sample, plain(*call).sample):
            exact.append(step)
    return exact


def test_an_application_s_own_processors_may_come_and_go_in_a_run(unet):
    apply_patch(unet, BOTH)
    with pytest.warns(UserWarning, match=r"stay unmerged: each has a .*\.RegionalAttnProcessor") as warned:
        assert exact_steps(unet, range(6, 12)) == [*range(6, 12)]
    assert len(warned) == 1
    forecasts = summary(unet).forecasts
    assert forecasts is not None
    assert any("RegionalAttnProcessor may have to see every step" in reason for reason in forecasts.reasons)


class UNetWithSamples(UNet2DConditionModel):  # type: ignore[misc]  # diffusers is not annotated
    """Takes what another network adds to its blocks, by the names that BrushNet and PowerPaint have for that."""

    def forward(
        self,
        sample: Tensor,
        timestep: Any,
        encoder_hidden_states: Tensor,
        down_block_add_samples: Any = None,
        mid_block_add_sample: Any = None,
        **others: Any,
    ) -> Any:
        residuals = {
            "down_block_additional_residuals": down_block_add_samples,
            "mid_block_additional_residual": mid_block_add_sample,
        }
        return UNet2DConditionModel.forward(self, sample, timestep, encoder_hidden_states, **residuals, **others)


def with_samples(replaced: bool) -> Any:
    """A network of that class, or one whose forward was replaced by that of the class, as PowerPaint does."""
    kind = UNet2DConditionModel if replaced else UNetWithSamples
    unet = kind(**UNET).eval().requires_grad_(False)
    if replaced:
        unet.forward = types.MethodType(UNetWithSamples.forward, unet)
    return unet


@torch.no_grad()
def painted(unet: Any) -> Tensor:
    """The outputs while latents and added samples move by a hundredth of their norm at each step."""
    down = [torch.ones(1, 16, 8, 8), torch.ones(1, 16, 8, 8), torch.ones(1, 16, 4, 4), torch.ones(1, 32, 4, 4)]
    outputs = []
    for step in range(STEPS):
        moved = 1 + step / 100
        added = {
            "down_block_add_samples": [moved * each for each in down],
            "mid_block_add_sample": moved * torch.ones(1, 32, 4, 4),
        }
        outputs.append(unet(moved * sample(), torch.tensor(950 - 40 * step), embedding(), **added).sample)
    return torch.cat(outputs)


@pytest.mark.parametrize("replaced", [False, True])
def test_added_samples_do_not_keep_clusters_from_being_reused(replaced):
    unet = with_samples(replaced)
    expected = painted(unet)
    assert torch.equal(painted(apply_patch(unet, r=1, r_keys=1)), expected)
    exact = painted(apply_patch(unet, r=0.5, recluster_threshold=0))
    reused = painted(apply_patch(unet, r=0.5))
    assert max(counts(unet)) <= STEPS / 2
    assert error(reused, exact) < error(exact, expected) / 2
    drawn = painted(apply_patch(unet, FORECAST))
    assert bool(forecast_steps(unet)) != replaced
    assert torch.equal(drawn, expected) == replaced
    assert ("forward was replaced" in str(summary(unet))) == replaced
