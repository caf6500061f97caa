"""Weights of merged keys in channels of the heads: the same attention, and no mask."""

from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0, SlicedAttnProcessor
from torch.utils._python_dispatch import TorchDispatchMode

from atc_diffusion import apply_patch, remove_patch
from tests.helpers.families import FAMILIES
from tests.helpers.unet import run

SHARES: list[dict[str, Any]] = [{"r": 1.0, "r_keys": 0.25}, {"r": 0.5}, {"r": 0.5, "r_keys": 0.25}]
# The others have masks of their own, for texts.
UNMASKED = ["sd15", "sdxl", "controlnet", "controlnet_xs", "animatediff", "sd3", "sd35", "flux"]


class Masks(TorchDispatchMode):
    """Counts the attentions that are given a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if "scaled_dot_product" in str(func) and (kwargs.get("attn_mask") is not None or len(args) > 5):
            self.count += 1
        return func(*args, **kwargs)


@pytest.mark.parametrize("shares", SHARES)
@pytest.mark.parametrize("name", FAMILIES)
def test_the_attention_is_the_same_as_with_a_mask(name, shares):
    family = FAMILIES[name]
    if shares["r"] != 1 and not family.merges_queries:
        pytest.skip("merges keys alone")
    network = family.make()
    with Masks() as masks:
        expected = family.run(apply_patch(network, **shares))
    assert masks.count
    with Masks() as masks:
        output = family.run(apply_patch(network, **shares, widen_heads=True))
    assert torch.allclose(output, expected, atol=1e-5)
    assert masks.count == 0 or name not in UNMASKED


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_loses_no_more_than_with_a_mask(unet, dtype):
    shares: dict[str, Any] = {"r": 1.0, "r_keys": 0.1}  # clusters of ten tokens: large weights
    exact = run(apply_patch(unet, **shares))
    unet.to(dtype)
    masked, widened = ((run(apply_patch(unet, **shares, widen_heads=x)).float() - exact).norm() for x in (False, True))
    assert widened <= 1.2 * masked


def test_other_processors_are_refused_by_the_patch_and_leave_layers_unmerged_later(unet):
    before = run(unet)
    apply_patch(unet, r_keys=0.25, widen_heads=True)
    unet.set_attn_processor(SlicedAttnProcessor(1))
    message = "has a .*SlicedAttnProcessor: wider heads need diffusers' AttnProcessor2_0; set that one, or leave out"
    with pytest.warns(UserWarning, match=f"3 attentions, the first .*attn1, stay unmerged: each {message}"):
        assert torch.allclose(run(unet), before, atol=1e-6)
    with pytest.raises(ValueError, match=message):
        apply_patch(unet, r_keys=0.25, widen_heads=True)


def test_removal_and_another_configuration_restore_the_processors(unet):
    before = unet.attn_processors
    apply_patch(unet, r_keys=0.25, widen_heads=True)
    run(unet)
    apply_patch(unet, r_keys=0.25)
    run(unet)
    assert unet.attn_processors == before
    apply_patch(unet, r_keys=0.25, widen_heads=True)
    remove_patch(unet)
    assert unet.attn_processors == before
    assert all(type(processor) is AttnProcessor2_0 for processor in before.values())
