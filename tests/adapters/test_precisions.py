"""Low precision and other layouts: merging costs no more there than in float32."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from atc_diffusion import ATCConfig, apply_patch
from atc_diffusion.testing import TinyNetwork
from tests.helpers.families import FAMILIES

# What changes a network, and the precision in which it computes then.
CHANGES: dict[str, tuple[Callable[[Any], Any], torch.dtype]] = {
    "float16": (lambda network: network.half(), torch.float16),
    "bfloat16": (lambda network: network.bfloat16(), torch.bfloat16),
    "channels_last": (lambda network: network.to(memory_format=torch.channels_last), torch.float32),
    "float8_weights": (
        lambda network: network.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32),
        torch.float32,
    ),
}


def error_of_merging(family: TinyNetwork, network: nn.Module, dtype: torch.dtype) -> float:
    """Relative change of the output when the network is patched."""
    inputs = tree_map(
        lambda x: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x, family.inputs(16, 16)
    )
    plain = family.run(network, **inputs)
    merged = family.run(apply_patch(network, ATCConfig.fast(0.25)), **inputs)
    assert merged.dtype == dtype
    return ((merged - plain).float().norm() / plain.float().norm()).item()


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["sd15", "sd3", "flux", "qwen_image", "z_image"])
def test_merging_errs_as_in_float32(name, change):
    network = FAMILIES[name].make()
    exact = error_of_merging(FAMILIES[name], copy.deepcopy(network), torch.float32)
    modify, dtype = CHANGES[change]
    modify(network)
    assert 0 < error_of_merging(FAMILIES[name], network, dtype) < 1.1 * exact + torch.finfo(dtype).eps
