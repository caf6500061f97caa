"""PyTorch hooks of others on a merged attention see what they would see without merging."""

from typing import Any

import pytest
from torch import Tensor

from atc_diffusion import apply_patch
from tests.helpers.loops import embedding, sample
from tests.helpers.unet import run

TOKENS = 8 * 8
SHARES = [{"r": 0.5}, {"r": 1, "r_keys": 0.25}]


@pytest.mark.parametrize("patched_first", [True, False])
@pytest.mark.parametrize("shares", SHARES)
def test_hooks_of_others_see_all_tokens(unet, shares, patched_first):
    attention = unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    seen: list[int] = []

    def before(_: Any, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0].shape[1])

    def after(_: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
        seen.append(args[0].ndim)
        seen.append(output.shape[1])

    if patched_first:
        apply_patch(unet, **shares)
    attention.register_forward_pre_hook(before)
    attention.register_forward_hook(after, prepend=True)
    if not patched_first:
        apply_patch(unet, **shares)
    run(unet)
    assert seen == [TOKENS, 3, TOKENS]


@pytest.mark.parametrize("form", [lambda output: {"sample": output.sample}, lambda output: ()])
def test_hooks_of_others_return_what_they_want_in_training(unet, form):
    unet.requires_grad_(True).register_forward_hook(lambda _, args, output: form(output))
    apply_patch(unet, r=0.5)
    assert type(unet(sample(), 500, embedding())) in (dict, tuple)


@pytest.mark.parametrize("patched", [True, False])
def test_a_patch_that_comes_within_a_call_is_refused(unet, patched):
    if patched:
        apply_patch(unet, r=0.5)
    attention = unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    attention.to_q.register_forward_pre_hook(lambda *_: apply_patch(unet) and None)
    with pytest.raises(ValueError, match="and patch it before"):
        run(unet)
