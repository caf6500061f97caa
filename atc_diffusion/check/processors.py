"""Every attention processor that is installed and known to work with merged tokens, against PyTorch's attention."""

import copy
import importlib.util
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from atc_diffusion.check.finding import Finding, find
from atc_diffusion.check.networks import error_of, make_unet, merged_output

TOLERANCE = 0.02


def check_processors(device: torch.device) -> Iterator[Finding]:
    torch.manual_seed(0)
    network, inputs = make_unet()
    expected = merged_output(network, inputs)
    dtype = torch.float32
    for name, change in _changes(device).items():
        subject = f"{name} on {device}"
        yield find(subject, partial(_error, network, inputs, device, dtype, expected, change), TOLERANCE)
    widened = partial(error_of, network, inputs, device, dtype, expected, widen_heads=True)
    yield find(f"weights in wider heads on {device}", widened, TOLERANCE)


def _error(
    network: Any, inputs: Any, device: torch.device, dtype: torch.dtype, expected: Any, change: Callable[[Any], None]
) -> float:
    network = copy.deepcopy(network)
    change(network)
    return error_of(network, inputs, device, dtype, expected)


def _changes(device: torch.device) -> dict[str, Callable[[Any], None]]:
    from diffusers.models import attention_processor as processors

    changes: dict[str, Callable[[Any], None]] = {
        "plain attention": lambda network: network.set_attn_processor(processors.AttnProcessor()),
        "PyTorch's attention": lambda network: network.set_attn_processor(processors.AttnProcessor2_0()),
        "sliced attention": lambda network: network.set_attention_slice(1),
    }
    if importlib.util.find_spec("xformers") and device.type == "cuda":
        changes["xFormers"] = lambda network: network.set_attn_processor(processors.XFormersAttnProcessor())
    return changes
