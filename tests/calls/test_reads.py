"""How often a call reads a value from the device, for which the CPU has to wait until a GPU has caught up."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from atc_diffusion import ATCConfig, apply_patch
from tests.helpers.tiny_pipelines import sd15

READS = (
    Tensor.tolist,
    Tensor.item,
    Tensor.cpu,
    Tensor.__float__,
    Tensor.__int__,
    Tensor.__index__,
    Tensor.__bool__,
    torch.equal,
)


class Reads(TorchFunctionMode):
    """Within this context, `count` is the number of reads."""

    count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in READS
        return func(*args, **kwargs or {})


def reads(config: ATCConfig, steps: int = 14) -> list[int]:
    """Of each call of a pipeline's UNet."""
    pipe, counts = apply_patch(sd15(), config), []
    pipe.set_progress_bar_config(disable=True)
    forward = type(pipe.unet).__call__

    def call(unet: Any, *args: Any, **kwargs: Any) -> Any:
        with Reads() as mode:
            output = forward(unet, *args, **kwargs)
        counts.append(mode.count)
        return output

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("atc_diffusion.merge_map.is_traced", lambda labels: True)  # only the CPU checks labels
        patch.setattr(type(pipe.unet), "__call__", call)
        pipe("ant", num_inference_steps=steps, height=64, width=64, output_type="latent")
    return counts


def test_a_call_reads_how_far_the_latents_moved_and_once_more_which_are_equal_where_it_clusters():
    counts = reads(ATCConfig.fast())
    assert len(counts) == 14
    assert counts[0] == 2  # the scheduler's timesteps, once for the run
    assert set(counts[1:]) == {1, 2}


def test_a_forecast_reads_nine_values_at_most_and_two_to_cluster():
    assert max(reads(ATCConfig.faster())) <= 11


def test_clustering_at_every_call_reads_nothing():
    config = ATCConfig(r=1.0, r_keys=0.125, recluster_threshold=0, share_guidance=False)
    assert set(reads(config)[1:]) == {0}
