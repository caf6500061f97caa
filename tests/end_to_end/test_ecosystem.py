"""What people use beside this: each works with a patch, and it does not matter which of the two comes first."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from atc_diffusion import apply_patch, merge_maps, remove_patch
from tests.helpers.ecosystem import (
    enable_deep_cache,
    enable_freeu,
    fuse_lora,
    load_ip_adapter,
    load_lora,
    offload_blocks,
    offload_groups,
    offload_model,
    offload_sequentially,
    picture,
    pipeline,
)

CHANGES_PICTURES = [load_lora, fuse_lora, load_ip_adapter, enable_freeu, enable_deep_cache]
OFFLOADS = [offload_model, offload_sequentially, offload_groups, offload_blocks]


def in_order(components: dict[str, Any], *steps: Callable[[Any], Any]) -> np.ndarray:
    """A picture of the pipeline after these `steps`, which may give options."""
    torch.manual_seed(1)
    pipe = pipeline(copy.deepcopy(components))
    options: dict[str, Any] = {}
    for step in steps:
        given = step(pipe)
        options |= given if isinstance(given, dict) else {}
    return picture(pipe, **options)


def patch(pipe: Any) -> None:
    apply_patch(pipe, r=0.5)


@pytest.mark.parametrize("use", [*CHANGES_PICTURES, *OFFLOADS])
def test_the_order_does_not_matter_and_removal_restores(components, use):
    alone, merged = in_order(components, use), in_order(components, use, patch)
    assert not np.array_equal(merged, alone)
    assert np.array_equal(in_order(components, patch, use), merged)
    assert np.array_equal(in_order(components, patch, use, remove_patch), alone)
    assert np.array_equal(in_order(components, use, patch, remove_patch), alone)
    assert np.array_equal(alone, in_order(components)) == (use in OFFLOADS)
    assert np.array_equal(merged, in_order(components, patch)) == (use in OFFLOADS)


@pytest.mark.parametrize("fuse", [False, True])
def test_unloading_lora_leaves_the_patched_model_as_before(components, fuse):
    pipe = apply_patch(pipeline(components), r=0.5)
    expected = picture(pipe)
    (fuse_lora if fuse else load_lora)(pipe)
    assert not np.allclose(picture(pipe), expected, atol=1e-3)
    if fuse:
        pipe.unfuse_lora()
    pipe.unload_lora_weights()
    assert np.allclose(picture(pipe), expected, atol=1e-5)


def test_keys_are_those_of_lora(components):
    """Tokens are compared by the keys that attention sees."""
    pipe = apply_patch(pipeline(components), r=0.5, record=True)
    load_lora(pipe)
    picture(pipe)
    loaded = merge_maps(pipe)[0].queries
    pipe.fuse_lora()
    picture(pipe)
    fused = merge_maps(pipe)[0].queries
    pipe.disable_lora()
    assert loaded is not None
    assert fused is not None
    assert torch.equal(loaded.labels, fused.labels)
