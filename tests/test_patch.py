"""Patching a real UNet: identity, restoration, and what merging does to attention."""

import copy
import gc
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel, UNet2DModel
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

import atc_diffusion
from atc_diffusion import (
    ATCConfig,
    DPCKNNConfig,
    KMedoidsConfig,
    MergeConfig,
    MergeMap,
    ToMeConfig,
    agglomerate,
    apply_patch,
    merge_maps,
    remove_patch,
    summary,
)
from atc_diffusion.testing import UNET
from tests.helpers.unet import attend, run

CONDITION: dict[str, Any] = {"conditioning_embedding_out_channels": (4, 8)}
CONFIGS = [
    ATCConfig(),
    ATCConfig.paper(0.4),
    ATCConfig.fast(0.3),
    ATCConfig(r=0.6, r_keys=0.2, linkage="ward", features="keys_values"),
    ATCConfig(r=0.5, r_keys=1, features="values", levels="all"),
    ATCConfig(r=0.5, linkage="single", backend="scipy"),
    ATCConfig(r={1: 0.4, 2: 0.5}, window_size=3),
    ToMeConfig(r=0.5),
    ToMeConfig(r=1, r_keys=0.5),
    KMedoidsConfig(r=0.5, r_keys=0.2),
    DPCKNNConfig(r=0.5, recluster_threshold=0.2),
]
SIZES = [(8, 8), (7, 9), (16, 4)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("config", CONFIGS)
def test_merging_changes_the_output_and_removal_restores_it_to_the_bit(unet, config, size):
    before = run(unet, size)
    assert apply_patch(unet, config) is unet
    merged = run(unet, size)
    assert merged.isfinite().all()
    assert not torch.equal(merged, before)
    assert remove_patch(unet) is unet
    assert torch.equal(run(unet, size), before)


@pytest.mark.parametrize("config_class", [ATCConfig, ToMeConfig])
def test_keeping_all_is_the_identity_to_the_bit(unet, config_class):
    before = run(unet)
    apply_patch(unet, config_class(r=1))
    assert torch.equal(run(unet), before)


FRACTIONS = [{"r": 0.25}, {"r": 1, "r_keys": 0.25}, {"r": 0.5, "r_keys": 0.25}]


@pytest.mark.parametrize("fractions", FRACTIONS)
def test_merging_equal_tokens_with_their_weight_is_exact(unet, fractions):
    """Proportional attention over duplicates equals attention over all of them (Bolya et al. 2023, Eq. 1)."""
    tokens = torch.randn(1, 4, 16).repeat_interleave(torch.tensor([1, 2, 5, 8]), dim=1)
    expected = attend(unet, tokens)
    apply_patch(unet, **fractions)
    assert torch.allclose(attend(unet, tokens), expected, atol=1e-6)
    apply_patch(unet, **fractions, proportional_attention=False)
    assert not torch.allclose(attend(unet, tokens), expected, atol=1e-3)


def test_merged_queries_alone_keep_their_keys(unet):
    attn = unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    tokens = torch.randn(1, 16, 16)
    labels = agglomerate(attn.to_k(tokens), 4)
    merged = MergeMap(labels, 4)
    expected = merged.unmerge(attn(merged.merge(tokens), encoder_hidden_states=tokens))
    apply_patch(unet, r=0.25, r_keys=1)
    assert torch.equal(attend(unet, tokens), expected)


@pytest.mark.parametrize("widen_heads", [False, True])
@pytest.mark.parametrize("proportional_attention", [True, False])
def test_a_mask_is_merged_with_the_tokens(unet, proportional_attention, widen_heads):
    """Masking a whole cluster of equal tokens is masking each of them."""
    tokens = torch.randn(1, 4, 16).repeat_interleave(4, dim=1)
    mask = torch.zeros(1, 1, 16)
    mask[:, :, :4] = -10000.0
    expected = attend(unet, tokens, attention_mask=mask)
    apply_patch(unet, r=0.25, proportional_attention=proportional_attention, widen_heads=widen_heads)
    assert torch.allclose(attend(unet, tokens, attention_mask=mask), expected, atol=1e-6)


def test_the_features_decide_what_is_merged(unet):
    outputs = [run(apply_patch(unet, features=f)) for f in ("keys", "values", "keys_values", "hidden_states")]
    assert all(not torch.equal(a, b) for i, a in enumerate(outputs) for b in outputs[:i])


def test_hidden_states_are_the_blocks_input_before_its_norm(unet):
    inputs: list[Tensor] = []
    block = unet.down_blocks[0].attentions[0].transformer_blocks[0]
    block.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    run(apply_patch(unet, ATCConfig.paper(0.5, record=True)), (7, 9))
    first = merge_maps(unet)[0]
    assert first.grid == (7, 9)
    assert first.queries is not None
    assert torch.equal(first.queries.labels, agglomerate(inputs[0], 32))


def test_the_clusters_of_a_run_are_recorded_on_request(unet):
    run(apply_patch(unet, r=0.5, r_keys=0.25, record=True), (7, 9))
    merges = merge_maps(unet)
    assert [(m.network, m.layer, m.step, m.grid) for m in merges] == [
        ("", layer.name, 0, (7, 9)) for layer in summary(unet).layers
    ]
    assert {(m.queries and m.queries.num_clusters, m.keys and m.keys.num_clusters) for m in merges} == {(32, 16)}
    run(apply_patch(unet, r=0.5))
    with pytest.raises(ValueError, match="were not recorded; patch with record=True"):
        merge_maps(unet)


def test_patching_again_replaces(unet):
    once = run(apply_patch(unet, r=0.4))
    apply_patch(unet, ToMeConfig(r=0.8))
    assert torch.equal(run(apply_patch(unet, r=0.4)), once)
    before = run(remove_patch(unet))
    assert torch.equal(run(remove_patch(unet)), before)


def test_nothing_but_hooks_is_touched(unet):
    keys, processors = list(unet.state_dict()), unet.attn_processors
    forwards = {name: type(module) for name, module in unet.named_modules()}
    apply_patch(unet)
    assert list(unet.state_dict()) == keys
    assert unet.attn_processors == processors
    assert {name: type(module) for name, module in unet.named_modules()} == forwards
    remove_patch(unet)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in unet.modules())


def test_a_deep_copy_is_independent(unet):
    before, merged = run(unet), run(apply_patch(unet))
    clone = copy.deepcopy(unet)
    remove_patch(unet)
    assert torch.equal(run(clone), merged)
    assert torch.equal(run(unet), before)
    for parameter in clone.parameters():
        parameter.zero_()
    assert torch.equal(run(unet), before)
    assert not run(clone).any()
    assert torch.equal(run(remove_patch(clone)), run(clone))


def test_save_and_load(unet, tmp_path):
    before = run(unet)
    apply_patch(unet).save_pretrained(tmp_path)
    assert torch.equal(run(UNet2DConditionModel.from_pretrained(tmp_path)), before)


def test_an_exception_in_the_forward_leaves_no_trace(unet):
    expected = run(apply_patch(unet))
    handle = unet.mid_block.register_forward_pre_hook(lambda module, args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(unet)
    handle.remove()
    assert torch.equal(run(unet), expected)


def test_latents_without_a_batch_fail_as_without_the_patch(unet):
    for model in (unet, apply_patch(unet)):
        with pytest.raises(RuntimeError):
            model(torch.randn(4, 8, 8), 1, torch.randn(1, 5, 12))


def test_the_global_generator_is_left_alone(unet):
    state = torch.get_rng_state()
    for config in CONFIGS:
        run(apply_patch(unet, config))
        assert torch.equal(torch.get_rng_state(), state)


def test_training_through_merged_attention(unet):
    parameter = unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1.to_v.weight
    parameter.requires_grad_(True)
    apply_patch(unet)
    unet(torch.randn(1, 4, 8, 8), 1, torch.randn(1, 5, 12)).sample.sum().backward()
    assert parameter.grad is not None
    assert parameter.grad.any()


def test_summary_tells_what_was_merged_in_the_last_run(unet):
    apply_patch(unet, r=0.5)
    assert [layer.clusterings for layer in summary(unet).layers] == [0, 0, 0]
    for timestep in torch.tensor([900, 850, 800, 750]):
        run(unet, timestep=timestep)
    assert [layer.clusterings for layer in summary(unet).layers] == [1, 1, 1]
    assert {layer.kept for layer in summary(unet).layers} == {(32, 32, 32, 32)}
    run(unet, (7, 9))
    layers = summary(unet).layers
    assert [layer.name.split(".attentions")[0] for layer in layers] == ["down_blocks.0", "up_blocks.1", "up_blocks.1"]
    facts = {(layer.level, layer.tokens, layer.kept, layer.kept_keys, layer.clusterings) for layer in layers}
    assert facts == {(1, 63, (32,), (32,), 1)}
    table = str(summary(unet)).splitlines()
    assert table[0].startswith("ATCConfig(r=0.5")
    assert table[1].split() == ["layer", "level", "tokens", "queries", "keys", "clusterings"]
    assert table[2].split() == ["down_blocks.0.attentions.0.transformer_blocks.0.attn1", "1", "63", "32", "32", "1"]


def test_summary_estimates_the_arithmetic_saved(unet):
    """Of 64 tokens of 16 channels: four projections of N C^2 and two products of N^2 C."""
    run(apply_patch(unet, r=0.5, r_keys=0.25))
    work = 2 * 16 * (16 * (32 + 16) + 32 * 16)
    assert summary(unet).work_saved == pytest.approx(1 - work / (2 * 16 * (16 * 128 + 64 * 64)))
    assert "% of the arithmetic of these attentions saved" in str(summary(unet))


def test_levels(unet):
    assert {layer.level for layer in summary(apply_patch(unet)).layers} == {1}
    layers = summary(apply_patch(unet, levels="all")).layers
    assert [layer.level for layer in layers] == [1, 2, 2, 2, 1, 1, 2]
    run(unet, (8, 8))
    assert [layer.tokens for layer in summary(unet).layers] == [64, 16, 16, 16, 64, 64, 16]


SD15_LAYOUT = {
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "block_out_channels": (8, 16, 32, 32),
    "mid_block_type": "UNetMidBlock2DCrossAttn",
}
SDXL_LAYOUT = {
    "down_block_types": ("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 2,
    "up_block_types": ("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",),
    "block_out_channels": (8, 16, 32),
    "transformer_layers_per_block": (1, 2, 10),
    "mid_block_type": "UNetMidBlock2DCrossAttn",
}


@pytest.mark.parametrize(("layout", "levels"), [(SD15_LAYOUT, {1}), (SDXL_LAYOUT, {2, 4})])
def test_the_costly_levels_depend_on_the_model(layout, levels):
    unet = apply_patch(bare_unet(**layout), ATCConfig.fast())
    assert {layer.level for layer in summary(unet).layers} == levels


def pipeline_with_a_small_controlnet() -> SimpleNamespace:
    """As controlnet-canny-sdxl-1.0-small: the UNet has attention at levels 2 and 4, the ControlNet at level 4."""
    unet = UNet2DConditionModel(
        **UNET
        | {
            "block_out_channels": (16, 32, 32),
            "down_block_types": ("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 2,
            "up_block_types": ("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",),
        }
    )
    sizes = {"block_out_channels": (16, 32, 32), "layers_per_block": 1, "cross_attention_dim": 12}
    heads = {"attention_head_dim": 2, "norm_num_groups": 4}
    small = ControlNetModel(down_block_types=("DownBlock2D",) * 3, **sizes, **heads, **CONDITION)
    return SimpleNamespace(unet=unet, controlnet=small)


BOTH_LEVELS = {("unet", 2), ("unet", 4), ("controlnet", 4)}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {("unet", 2)}),
        ({"levels": "all"}, BOTH_LEVELS),
        ({"r": {2: 0.5, 4: 0.5}}, BOTH_LEVELS),
        ({"r": {4: 0.5}}, {("unet", 4), ("controlnet", 4)}),
    ],
)
def test_a_controlnet_is_merged_at_the_levels_of_the_denoiser(options, expected):
    pipe = apply_patch(pipeline_with_a_small_controlnet(), **options)
    assert {(layer.network, layer.level) for layer in summary(pipe).layers} == expected


def test_a_level_that_no_network_has_is_refused():
    message = "level 8 was asked for, but the levels that have self-attention are 2, 4; use some of them"
    with pytest.raises(ValueError, match=message):
        apply_patch(pipeline_with_a_small_controlnet(), r={2: 0.5, 8: 0.5})


def bare_unet(**changes: Any) -> UNet2DConditionModel:
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2, "mid_block_type": None}
    sizes = {"block_out_channels": (8, 8), "norm_num_groups": 4, "cross_attention_dim": 4}
    return UNet2DConditionModel(**sizes | blocks | changes)


ATTENTION_ONLY = UNet2DModel(
    block_out_channels=(32,), down_block_types=("AttnDownBlock2D",), up_block_types=("AttnUpBlock2D",)
)
COARSE = bare_unet(down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"))


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (
            nn.Linear(1, 1),
            {},
            "Linear has no self-attention that can be merged; supported are Stable Diffusion 1, 2, XL",
        ),
        ("a pipeline", {}, "str has no unet or transformer; pass a pipeline that has one, or the network"),
        (bare_unet(), {}, "UNet2DConditionModel has no self-attention that can be merged"),
        (ATTENTION_ONLY, {}, "UNet2DModel has no self-attention that can be merged"),
        (COARSE, {"levels": (1,)}, "level 1 was asked for, but the levels that have self-attention are 2; use some"),
    ],
)
def test_models_that_do_not_fit_are_named(model, options, message):
    with pytest.raises(ValueError, match=message):
        apply_patch(model, **options)


@pytest.mark.parametrize("around", [lambda unet: nn.ModuleList([unet]), nn.Sequential])
def test_a_patch_is_not_removed_from_something_around_the_network(unet, around):
    apply_patch(unet, r=0.5)
    with pytest.raises(ValueError, match=r"this .* has a patched UNet2DConditionModel in it; pass that"):
        remove_patch(around(unet))
    assert summary(unet).config == ATCConfig(r=0.5)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script. is deprecated")
def test_a_scripted_network_is_refused():
    network = torch.jit.script(nn.Linear(1, 1))
    assert remove_patch(network) is network
    with pytest.raises(ValueError, match="RecursiveScriptModule has no self-attention that can be merged"):
        apply_patch(network)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 60}, "did you mean 0.6"),
        ({"ratio": 0.5}, "ATCConfig has no option 'ratio'; .*: ratio=0.5 is r=0.5"),
        ({"config": ATCConfig(), "r": 0.5}, "either config or options, got both"),
        ({"config": {"r": 0.5}}, "config must be a configuration, such as an ATCConfig, got {'r': 0.5}"),
        ({"config": 0.6}, r"config must be a configuration, such as an ATCConfig, got 0.6; did you mean r=0.6\?"),
        ({"config": 60}, r"got 60; did you mean r=0.6\?"),
        ({"config": "fast"}, r"got 'fast'; did you mean ATCConfig.fast\(\)\?"),
        ({"config": ATCConfig.fast}, r"did you mean ATCConfig.fast\(\)\?"),
        ({"config": "cluster"}, "got 'cluster'$"),
        ({"config": "paper"}, r"did you mean ATCConfig.paper\(r=0.4\)\?"),
        ({"config": ToMeConfig}, r"did you mean ToMeConfig\(\)\?"),
        ({"config": lambda progress: 0.5}, r"did you mean r=, as a function of progress\?"),
        ({"config": MergeConfig}, r"did you mean ATCConfig\(\)\?"),
    ],
)
def test_bad_options_leave_the_model_as_it_was(unet, options, message):
    expected = run(apply_patch(unet, r=0.7))
    with pytest.raises(ValueError, match=message):
        apply_patch(unet, **options)
    assert torch.equal(run(unet), expected)


def test_summary_of_an_unpatched_model_says_so(unet):
    with pytest.raises(ValueError, match="this UNet2DConditionModel is not patched; call apply_patch first"):
        summary(unet)


def test_the_public_names_are_all_there():
    assert all(hasattr(atc_diffusion, name) for name in atc_diffusion.__all__)


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("config", [ATCConfig(r=0.5), ATCConfig.faster()])
def test_a_call_keeps_its_activations_no_longer_than_without_a_patch(unet, config, gradients):
    """Not even until Python collects garbage, which may be many calls later."""
    apply_patch(unet, config)
    text = torch.randn(1, 5, 12)
    gc.collect()
    gc.disable()
    try:
        with torch.set_grad_enabled(gradients):
            latents = torch.randn(1, 4, 8, 8, requires_grad=gradients)
            passed = [weakref.ref(latents)]
            handles = [
                module.register_forward_pre_hook(lambda _, args: passed.append(weakref.ref(args[0])))
                for module in unet.modules()
                if isinstance(module, Attention)
            ]
            output = unet(latents, 10, text).sample
            for handle in handles:
                handle.remove()
        if gradients:
            output.sum().backward()
        del output, latents
        assert not any(tensor() is not None for tensor in passed)
    finally:
        gc.enable()
