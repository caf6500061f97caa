"""xFormers, which runs on CUDA alone: its rule for masks, at any number of kept keys."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.models import attention_dispatch, attention_processor
from diffusers.models.attention_processor import XFormersAttnProcessor
from torch import Tensor
from torch.nn import functional as F

from atc_diffusion import ATCConfig, apply_patch
from tests.helpers.families import FAMILIES
from tests.helpers.unet import run

KEYS = [6, 10]  # of 24 tokens: not enough for numbers of keys that are multiples of 8


def memory_efficient_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_bias: Tensor | None = None, *_: Any, **__: Any
) -> Tensor:
    """Attention `[B, N, H, D]` or `[B * H, N, D]` on the CPU that refuses what xFormers refuses on CUDA."""
    if attn_bias is not None:
        assert attn_bias.shape[-2:] == (query.shape[1], key.shape[1])
        assert not any(stride % (128 // torch.finfo(attn_bias.dtype).bits) for stride in attn_bias.stride()[:-1])
    query, key, value = (x.movedim(1, -2) for x in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=attn_bias).movedim(-2, 1)


@pytest.fixture(autouse=True)
def xformers(monkeypatch: pytest.MonkeyPatch) -> None:
    ops = SimpleNamespace(memory_efficient_attention=memory_efficient_attention)
    monkeypatch.setattr(attention_processor, "xformers", SimpleNamespace(ops=ops))
    monkeypatch.setattr(attention_dispatch, "xops", ops)
    monkeypatch.setattr(attention_dispatch, "_CAN_USE_XFORMERS_ATTN", True)


@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_masks_of_any_number_of_keys_are_aligned_as_xformers_asks(unet, keys, dtype):
    size, config = (4, 6), ATCConfig.fast(keys / 24)
    unet.to(dtype)
    expected = run(apply_patch(unet, config), size)
    unet.set_attn_processor(XFormersAttnProcessor())
    assert torch.allclose(run(unet, size), expected, atol=1e-5 if dtype == torch.float32 else 0.05)


@pytest.mark.parametrize("name", ["flux", "qwen_image"])  # diffusers adds Z-Image's bool masks as numbers
def test_so_are_those_of_rotary_transformers(name):
    network = FAMILIES[name].make()
    expected = FAMILIES[name].run(apply_patch(network, ATCConfig.fast(0.25)))
    with attention_dispatch.attention_backend("xformers"):
        assert torch.allclose(FAMILIES[name].run(network), expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_xformers_itself_takes_slices_of_longer_masks(dtype):
    fmha = pytest.importorskip("xformers.ops.fmha")
    queries, keys = (torch.zeros(1, tokens, 8, 40, dtype=dtype) for tokens in (24, 10))
    for length, taken in ((16, True), (10, False)):
        mask = torch.zeros(8, 1, length, dtype=dtype)[None, ..., :10].expand(-1, -1, 24, -1)
        reasons = fmha.cutlass.FwOp.not_supported_reasons(fmha.Inputs(queries, keys, keys, attn_bias=mask))
        assert taken == (not any("attn_bias" in reason for reason in reasons))
