"""One call of a tiny UNet, and of its first self-attention."""

from typing import Any

import torch
from torch import Tensor


def run(unet: Any, size: tuple[int, int] = (8, 8), timestep: int = 10) -> Tensor:
    """One step on the same made-up input, batch 2."""
    generator = torch.Generator().manual_seed(0)
    sample, text = torch.randn(2, 4, *size, generator=generator), torch.randn(2, 5, 12, generator=generator)
    with torch.no_grad():
        return unet(sample.to(unet.dtype), timestep, text.to(unet.dtype)).sample


def attend(unet: Any, tokens: Tensor, **options: Any) -> Tensor:
    """The output of the first self-attention for `tokens` `[B, 16, C]`, within a call of its network."""
    attn, outputs = unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1, []
    with unet.conv_in.register_forward_pre_hook(lambda *_: outputs.append(attn(tokens, **options))):
        unet(torch.randn(len(tokens), 4, 4, 4), torch.tensor(500), torch.randn(len(tokens), 5, 12))
    return outputs[0]
