"""torch.compile: patched UNets compile whole, and compiled ones notice a patch."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import Tensor

from atc_diffusion import ATCConfig, ToMeConfig, apply_patch, remove_patch, summary
from atc_diffusion.testing import UNET
from tests.helpers.loops import embedding, sample

# Of one level, because what takes time here is tracing.
SMALL = UNET | {
    "block_out_channels": (16,),
    "down_block_types": ("DownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
    "mid_block_type": None,
}
TIMESTEPS = torch.tensor([900, 700, 500, 300, 100])


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(**SMALL).eval().requires_grad_(False)


def inputs(step: int, size: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """The call of a network at one step of `TIMESTEPS`."""
    generator = torch.Generator().manual_seed(0)
    sample, text = torch.randn(2, 4, size, 8, generator=generator), torch.randn(2, 5, 12, generator=generator)
    return sample, TIMESTEPS[step], text


def close(a: Tensor, b: Tensor) -> bool:
    """Equal but for the rounding of fused kernels; merging moves the output by 1e-2."""
    return torch.allclose(a, b, atol=1e-4)


@pytest.mark.slow
@torch.no_grad()
def test_the_whole_unet_compiles_without_a_graph_break(unet):
    before = unet(*inputs(0)).sample
    expected = [apply_patch(unet, r=0.5, r_keys=0.2, recluster_threshold=0)(*inputs(step)).sample for step in (0, 1)]
    compiled = torch.compile(unet, fullgraph=True, backend="aot_eager")
    for step, output in enumerate(expected):
        assert close(compiled(*inputs(step)).sample, output)
        assert not close(output, before)
    assert {layer.clusterings for layer in summary(compiled).layers} == {2}


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize(
    "config", [ATCConfig(r=1, r_keys=0.3, features="hidden_states", widen_heads=True), ToMeConfig()]
)
def test_every_form_is_traced_whole_and_never_again(unet, config):
    expected = [apply_patch(unet, replace(config, recluster_threshold=0))(*inputs(step)).sample for step in range(3)]
    compiled = torch.compile(unet, fullgraph=True, backend="eager")
    assert close(compiled(*inputs(0)).sample, expected[0])
    with torch.compiler.set_stance("fail_on_recompile"):
        assert close(compiled(*inputs(1)).sample, expected[1])
        assert close(compiled(*inputs(2)).sample, expected[2])


@pytest.mark.slow
@torch.no_grad()
def test_reuse_compiles_whole_and_settles(unet):
    """Within the first clustering that knows the guidance's parts, here the fourth step at the latest."""
    prompt, latents = embedding(2), sample().repeat(2, 1, 1, 1)
    steps = torch.arange(900, 100, -100)
    apply_patch(unet, r=0.5, r_keys=0.25, linkage="ward", window_size=4)
    expected = [unet(latents + t / 1000, t, prompt).sample for t in steps]
    compiled = torch.compile(unet, fullgraph=True, backend="eager")
    for t, output in zip(steps[:4], expected, strict=False):
        assert close(compiled(latents + t / 1000, t, prompt).sample, output)
    with torch.compiler.set_stance("fail_on_recompile"):
        for t, output in zip(steps[4:], expected[4:], strict=True):
            assert close(compiled(latents + t / 1000, t, prompt).sample, output)


@pytest.mark.slow
@torch.no_grad()
def test_another_size_compiles(unet):
    apply_patch(unet, r=0.5, r_keys=0.2)
    calls = [inputs(0, size) for size in (8, 12)]
    expected = [unet(*call).sample for call in calls]
    compiled = torch.compile(unet, fullgraph=True, backend="eager", dynamic=True)
    for call, output in zip(calls, expected, strict=True):
        assert close(compiled(*call).sample, output)


@pytest.mark.slow
@torch.no_grad()
def test_regional_compilation_works_after_patching(unet):
    """By inductor, which takes long; the other tests only trace."""
    expected = apply_patch(unet)(*inputs(0)).sample
    unet.compile_repeated_blocks(fullgraph=True)
    assert close(unet(*inputs(0)).sample, expected)


@pytest.mark.slow
@torch.no_grad()
def test_patching_a_compiled_unet_takes_effect_and_so_does_removal(unet):
    """Also where the bare UNet is patched and its compiled wrapper is called."""
    compiled = torch.compile(unet, fullgraph=True, backend="eager")
    before = compiled(*inputs(0)).sample
    apply_patch(unet)
    merged = compiled(*inputs(0)).sample
    assert not close(merged, before)
    assert close(merged, unet(*inputs(0)).sample)
    remove_patch(compiled)
    assert close(compiled(*inputs(0)).sample, before)
    assert not close(apply_patch(compiled)(*inputs(0)).sample, before)


@pytest.mark.slow
@torch.no_grad()
def test_patching_after_regional_compilation_takes_effect(unet):
    unet.compile_repeated_blocks(fullgraph=True, backend="eager")
    before = unet(*inputs(0)).sample
    assert not close(apply_patch(unet)(*inputs(0)).sample, before)
    assert close(remove_patch(unet)(*inputs(0)).sample, before)


@pytest.mark.slow
@torch.no_grad()
def test_a_lora_is_swapped_without_another_compilation(unet):
    loras = [lora(seed) for seed in range(2)]
    unet.enable_lora_hotswap(target_rank=4)
    unet.load_lora_adapter(loras[0], prefix=None, adapter_name="style")
    apply_patch(unet, r=0.5, r_keys=0.2)
    compiled = torch.compile(unet, fullgraph=True, backend="eager")
    first = [compiled(*inputs(step)).sample for step in range(2)]
    unet.load_lora_adapter(loras[1], prefix=None, adapter_name="style", hotswap=True)
    with torch.compiler.set_stance("fail_on_recompile"):
        second = [compiled(*inputs(step)).sample for step in range(2)]
    torch.compiler.reset()
    assert all(close(output, unet(*inputs(step)).sample) for step, output in enumerate(second))
    assert not any(map(close, first, second))


def lora(seed: int) -> dict[str, Tensor]:
    """The weights of an adapter."""
    torch.manual_seed(seed)
    twin = UNet2DConditionModel(**SMALL)
    twin.add_adapter(LoraConfig(r=2 + seed, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False))
    return get_peft_model_state_dict(twin)
