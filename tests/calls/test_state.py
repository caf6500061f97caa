"""What a network's output depends on besides its arguments."""

from typing import Any

import pytest
import torch
from accelerate.hooks import CpuOffload, add_hook_to_module
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.pipelines.ledits_pp.pipeline_leditspp_stable_diffusion import (
    LeditsAttentionStore,
    LEDITSCrossAttnProcessor,
)
from peft import LoraConfig
from torch import nn

from atc_diffusion.calls.state import NetworkState


def with_lora(unet: Any) -> Any:
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), "style")
    return unet


class Counting(AttnProcessor2_0):  # type: ignore[misc]  # diffusers is not annotated
    """Of another package."""


class Tiled(nn.Conv2d):
    """Of another package."""


CHANGES: dict[str, Any] = {
    "a weight written in place": lambda unet: unet.conv_out.weight.data.mul_(1.5),
    "a weight written in place, counted": lambda unet: nn.init.zeros_(unet.conv_out.bias),
    "a weight written in place, but for its first value": lambda unet: unet.conv_out.weight.data[1:].mul_(-0.5),
    "a weight exchanged": lambda unet: setattr(unet.conv_out, "bias", nn.Parameter(unet.conv_out.bias.clone())),
    "a buffer written in place": lambda unet: unet.conv_in.strength.data.mul_(1.5),
    "a buffer exchanged": lambda unet: setattr(unet.conv_in, "strength", torch.ones(1)),
    "a module exchanged": lambda unet: setattr(unet, "conv_out", nn.Conv2d(16, 4, 3, padding=1)),
    "a LoRA's weight": lambda unet: unet.set_adapters("style", 0.5),
    "a LoRA switched off": lambda unet: unet.disable_adapters(),
    "a processor": lambda unet: unet.set_attn_processor(AttnProcessor2_0()),
    "how a convolution pads": lambda unet: setattr(unet.conv_out, "padding_mode", "circular"),
    "a module's own scale": lambda unet: setattr(unet.conv_in, "scale", 0.5),
    "a module's class": lambda unet: setattr(unet.conv_in, "__class__", Tiled),
    "FreeU": lambda unet: unet.enable_freeu(0.9, 0.2, 1.2, 1.4),
}


def test_writes_are_noticed_in_weights_that_are_offloaded(unet):
    add_hook_to_module(unet, CpuOffload())
    state = NetworkState(unet)
    before = state.fingerprint(in_place=True)
    unet.conv_out.weight.data.mul_(1.5)
    assert state.fingerprint(in_place=True) != before


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_noticed_and_nothing_else(unet, change):
    unet.conv_in.register_buffer("strength", torch.ones(1))
    state = NetworkState(with_lora(unet))
    before = state.fingerprint(in_place=True)
    with torch.no_grad():
        unet(torch.randn(1, 4, 8, 8), 500, torch.randn(1, 5, 12))
    assert state.fingerprint(in_place=True) == before
    with torch.no_grad():
        CHANGES[change](unet)
    assert state.fingerprint(in_place=True) != before


def test_hooks_processors_and_forwards_of_others_are_named(unet):
    state = NetworkState(unet)
    assert state.stranger() == ""
    handle = unet.conv_in.register_forward_hook(lambda *_: None)
    assert "hook tests.calls" in state.stranger()
    handle.remove()
    unet.set_attn_processor(Counting())
    assert "processor tests.calls.test_state.Counting" in state.stranger()
    unet.set_attn_processor(LEDITSCrossAttnProcessor(LeditsAttentionStore(average=False), "up", False, 1))
    assert "processor diffusers.pipelines.ledits_pp" in state.stranger()  # its pipeline reads what it stores
    unet.set_attn_processor(AttnProcessor2_0())
    block = unet.down_blocks[0]
    block.forward = lambda *args, **kwargs: type(block).forward(block, *args, **kwargs)
    assert "forward tests.calls" in state.stranger()
    block.forward = type(block).forward.__get__(block)  # put back, as DeepCache does
    assert state.stranger() == ""


@pytest.mark.parametrize("kind", [nn.GroupNorm, BasicTransformerBlock])
def test_a_forward_replaced_in_a_class_is_named(unet, monkeypatch, kind):
    state, forward = NetworkState(unet), kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, *args, **kwargs: forward(self, *args, **kwargs))
    assert "forward tests.calls.test_state" in state.stranger()
