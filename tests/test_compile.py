"""torch.compile: patched UNets compile whole, and compiled ones notice a patch."""

from collections.abc import Iterator

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from atc_diffusion import ATCConfig, ToMeConfig, apply_patch, remove_patch, summary
from tests.conftest import UNET


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def inputs(timestep: float) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    sample, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, 12, generator=generator)
    return sample, torch.tensor(timestep), text


def close(a: Tensor, b: Tensor) -> bool:
    """Equal but for the rounding of fused kernels; merging moves the output by 1e-2."""
    return torch.allclose(a, b, atol=1e-4)


@torch.no_grad()
def test_the_whole_unet_compiles_without_a_graph_break(unet):
    before = unet(*inputs(10)).sample
    expected = [apply_patch(unet)(*inputs(t)).sample for t in (10, 5)]
    compiled = torch.compile(unet, fullgraph=True)
    for timestep, output in zip((10, 5), expected, strict=True):
        assert close(compiled(*inputs(timestep)).sample, output)
        assert not close(output, before)
    assert {layer.clusterings for layer in summary(compiled).layers} == {2}


@torch.no_grad()
@pytest.mark.parametrize("config", [ATCConfig(merge="keys_values", features="hidden_states"), ToMeConfig()])
def test_every_form_is_traced_whole_and_never_again(unet, config):
    expected = [apply_patch(unet, config)(*inputs(t)).sample for t in (10, 5, 8)]
    compiled = torch.compile(unet, fullgraph=True, backend="eager")
    assert close(compiled(*inputs(10)).sample, expected[0])
    with torch.compiler.set_stance("fail_on_recompile"):
        assert close(compiled(*inputs(5)).sample, expected[1])
        assert close(compiled(*inputs(8)).sample, expected[2])


@torch.no_grad()
def test_regional_compilation_works_after_patching(unet):
    expected = apply_patch(unet)(*inputs(10)).sample
    unet.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    assert close(unet(*inputs(10)).sample, expected)


@torch.no_grad()
@pytest.mark.parametrize("wrapped", [True, False])
def test_patching_a_compiled_unet_takes_effect_and_so_does_removal(unet, wrapped):
    """Also where only the bare UNet is patched and its compiled wrapper is called."""
    compiled = torch.compile(unet, fullgraph=True, backend="eager")
    before = compiled(*inputs(10)).sample
    apply_patch(compiled if wrapped else unet)
    merged = compiled(*inputs(10)).sample
    assert not close(merged, before)
    assert close(merged, unet(*inputs(10)).sample)
    remove_patch(compiled if wrapped else unet)
    assert close(compiled(*inputs(10)).sample, before)


@torch.no_grad()
def test_patching_after_regional_compilation_takes_effect():
    unet = UNet2DConditionModel(**UNET).eval()
    unet.compile_repeated_blocks(fullgraph=True, backend="eager")
    before = unet(*inputs(10)).sample
    assert not close(apply_patch(unet)(*inputs(10)).sample, before)
    assert close(remove_patch(unet)(*inputs(10)).sample, before)
