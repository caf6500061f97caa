"""Every supported family of networks: identity, removal, shares, reuse, and attention beside an explicit reference."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import (
    QwenImageTransformer2DModel,
    SanaTransformer2DModel,
    UNet2DConditionModel,
    UNetSpatioTemporalConditionModel,
)
from diffusers.models.unets.unet_stable_cascade import StableCascadeUNet
from torch import Tensor, nn

from atc_diffusion import ATCConfig, RecordedMerge, ToMeConfig, apply_patch, merge_maps, remove_patch, summary
from atc_diffusion.testing import QWEN_IMAGE, UNET, TinyNetwork
from tests.helpers.families import FAMILIES

SHARES = [{"r": 0.5}, {"r": 1, "r_keys": 0.25}, {"r": 0.5, "r_keys": 0.25}]
TIMESTEPS = torch.tensor([900, 750, 600, 450, 300, 150])


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> TinyNetwork:
    return FAMILIES[request.param]


@pytest.fixture
def network(family: TinyNetwork) -> nn.Module:
    return family.make()


def allowed(family: TinyNetwork, shares: dict[str, float]) -> None:
    """Skip where queries should merge and cannot."""
    if shares.get("r") != 1 and not family.merges_queries:
        pytest.skip("merges keys alone")


def tokens_of(family: TinyNetwork, height: int = 8, width: int = 12) -> int:
    return height // family.level * (width // family.level)


def test_keeping_all_is_the_identity_to_the_bit(family, network):
    before = family.run(network)
    apply_patch(network, r=1)
    assert torch.equal(family.run(network), before)


@pytest.mark.parametrize("shares", SHARES)
def test_merging_changes_the_output_and_removal_restores_it_to_the_bit(family, network, shares):
    before = family.run(network)
    allowed(family, shares)
    apply_patch(network, **shares)
    merged = family.run(network)
    assert merged.isfinite().all()
    assert not torch.allclose(merged, before, atol=1e-4)
    kept, kept_keys = (round(shares.get(name, shares["r"]) * tokens_of(family)) for name in ("r", "r_keys"))
    facts = {(x.level, x.tokens, x.kept, x.kept_keys) for x in summary(network).layers}
    assert facts == {(family.level, tokens_of(family), (kept,), (kept_keys,))}
    remove_patch(network)
    assert torch.equal(family.run(network), before)


def processors(network: nn.Module) -> list[object]:
    return [module.processor for module in network.modules() if hasattr(module, "processor")]


def test_nothing_is_left_behind(family, network):
    before, weights = processors(network), network.state_dict()
    family.run(apply_patch(network, **family.half))
    assert list(network.state_dict()) == list(weights)
    remove_patch(network)
    assert all(a is b for a, b in zip(processors(network), before, strict=True))
    assert all(torch.equal(weights[name], tensor) for name, tensor in network.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


def test_an_argument_that_is_missing_is_named(family, network):
    apply_patch(network, **family.half)
    inputs = family.inputs(8, 12) | family.timestep(torch.full((2,), 10))
    read = {"sample", "hidden_states", "x", "timestep", "t", "img_ids", "img_shapes", "cap_feats"}
    for name in inputs.keys() & read:
        with pytest.raises(TypeError, match=f"argument.*'{name}'"):
            network(**{other: value for other, value in inputs.items() if other != name})


def test_applying_twice_is_applying_once(family, network):
    once = family.run(apply_patch(network, **family.half))
    assert torch.equal(family.run(apply_patch(network, **family.half)), once)


def test_a_deep_copy_is_independent(family, network):
    before, merged = family.run(network), family.run(apply_patch(network, **family.half))
    clone = copy.deepcopy(network)
    remove_patch(network)
    assert torch.equal(family.run(clone), merged)
    for parameter in clone.parameters():
        parameter.zero_()
    assert torch.equal(family.run(network), before)
    assert not family.run(clone).any()


@pytest.mark.parametrize(
    "config",
    [
        ToMeConfig(r=0.5),
        ATCConfig(window_size=3, features="keys_values"),
        ATCConfig(window_size=2),
        ATCConfig.paper(0.4),
    ],
)
def test_every_way_of_clustering(family, network, config):
    config = config if family.merges_queries else replace(config, r=1.0, r_keys=config.r)
    before = family.run(network)
    merged = family.run(apply_patch(network, config))
    assert merged.isfinite().all()
    assert not torch.allclose(merged, before, atol=1e-4)
    assert torch.equal(family.run(apply_patch(network, config)), merged)


def test_levels_may_be_named(family, network):
    shares: Any = {name: {family.level: share} for name, share in family.half.items()}
    apply_patch(network, **shares)
    assert len(summary(network).layers) == family.layers
    with pytest.raises(ValueError, match=r"level 8 was asked for, but the levels that have self-attention are"):
        apply_patch(network, r={8: 0.5})


def test_the_clusters_are_recorded_in_the_order_of_the_layers(family, network):
    family.run(apply_patch(network, **family.half, record=True))
    merges, layers = merge_maps(network), summary(network).layers
    assert len(layers) == family.layers
    assert [(m.network, m.layer) for m in merges] == [(x.network, x.name) for x in layers]
    assert {m.grid for m in merges} == {(8 // family.level, 12 // family.level)}


def test_clusters_serve_steps_and_both_parts_of_guidance(family, network):
    """Shared from the second clustering on: then equal latents are parts of guidance."""
    apply_patch(network, **family.half, recluster_threshold=0.2, record=True)
    first, _ = half_and_half(family)
    moved = {name: scaled(value, 1.3) for name, value in first.items() if name != "controlnet_cond"}
    for i, timestep in enumerate(TIMESTEPS):
        family.run(network, timestep, **first | (moved if i >= 3 else {}))
    assert {layer.clusterings for layer in summary(network).layers} == {2}
    shared = labels_of(network, steps={3, 4, 5})
    assert all(torch.equal(*labels.chunk(2)) for labels in shared)


def scaled(latents: Any, factor: float) -> Any:
    return [factor * x for x in latents] if isinstance(latents, list) else factor * latents


def test_different_pictures_are_never_clustered_as_one(family, network):
    apply_patch(network, **family.half, recluster_threshold=0, record=True)
    _, second = half_and_half(family)
    for timestep in TIMESTEPS[:2]:
        family.run(network, timestep, **second)
    assert not any(torch.equal(*labels.chunk(2)) for labels in labels_of(network, steps={1}))


def labels_of(network: nn.Module, steps: set[int]) -> list[Tensor]:
    return [merge.keys.labels for merge in merge_maps(network) if merge.keys and merge.step in steps]


def half_and_half(family: TinyNetwork) -> tuple[dict[str, Any], dict[str, Any]]:
    """Inputs with one picture under guidance, and with two pictures; conditions are the same for both halves."""
    inputs = family.inputs(8, 12)
    name = next(name for name in ("sample", "x", "hidden_states") if name in inputs)
    pictures = inputs[name]
    condition = inputs.get("controlnet_cond")
    shared = {} if condition is None else {"controlnet_cond": repeat_first(condition)}
    same = pictures[:1] * 2 if isinstance(pictures, list) else pictures[:1].repeat(2, *[1] * (pictures.ndim - 1))
    return shared | {name: same}, shared | {name: pictures}


def repeat_first(condition: Any) -> Any:
    if isinstance(condition, list):
        return [repeat_first(each) for each in condition]
    return condition[:1].repeat(2, *[1] * (condition.ndim - 1))


def test_a_schedule_of_shares(family, network):
    if not family.merges_queries:
        pytest.skip("tells the progress by the timestep's value")
    apply_patch(network, r=lambda progress: 0.25 + 0.5 * progress, r_keys=0.25)
    for timestep in TIMESTEPS[:3]:
        family.run(network, timestep)
    kept = tuple(round((0.25 + 0.1 * step) * tokens_of(family)) for step in range(3))
    assert {layer.kept for layer in summary(network).layers} == {kept}
    assert {layer.kept_keys for layer in summary(network).layers} == {(tokens_of(family) // 4,) * 3}


@pytest.mark.parametrize("name", ["flux", "qwen_image", "z_image"])
def test_a_schedule_of_shares_by_the_value_of_the_timestep(name):
    family = FAMILIES[name]
    network = apply_patch(family.make(), r=1, r_keys=lambda progress: 0.25 + 0.5 * progress)
    for timestep in (1000, 500, 0):
        family.run(network, timestep)
        kept = round((0.75 - 0.5 * timestep / 1000) * tokens_of(family))
        assert {layer.kept_keys[-1] for layer in summary(network).layers} == {kept}


@pytest.mark.parametrize("shares", SHARES)
def test_attention_is_softmax_over_logits_plus_log_sizes(family, network, shares):
    """Bolya et al. 2023, Eq. 1, written out; a text's columns have size 1."""
    if not family.merges_queries:
        pytest.skip("has a reference of its own")
    calls = recorded_calls(network)
    apply_patch(network, record=True, **shares)
    results = outputs(network)
    family.run(network)
    merges = merge_maps(network)
    assert len(merges) == family.layers
    for merge in merges:
        attention = submodule(network, merge)
        expected = explicit_attention(attention, calls[attention], merge)
        for actual, part in zip(as_tuple(results[attention]), expected, strict=True):
            assert torch.allclose(actual, part, atol=1e-5)


def submodule(network: nn.Module, merge: RecordedMerge) -> nn.Module:
    return network.get_submodule(f"{merge.network}.{merge.layer}".lstrip("."))


def recorded_calls(network: nn.Module) -> dict[nn.Module, tuple[Tensor, Tensor | None]]:
    """Tokens and text that every attention is given; to be called before the network is patched."""
    calls: dict[nn.Module, tuple[Tensor, Tensor | None]] = {}

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls[module] = (args[0] if args else kwargs["hidden_states"], kwargs.get("encoder_hidden_states"))

    for module in network.modules():
        if hasattr(module, "processor"):
            module.register_forward_pre_hook(keep, with_kwargs=True)
    return calls


def outputs(network: nn.Module) -> dict[nn.Module, Any]:
    """What every attention returns; to be called after the network is patched."""
    results: dict[nn.Module, Any] = {}
    for module in network.modules():
        if hasattr(module, "processor"):
            module.register_forward_hook(lambda module, args, output: results.update({module: output}))
    return results


def explicit_attention(attn: Any, call: tuple[Tensor, Tensor | None], merge: RecordedMerge) -> tuple[Tensor, ...]:
    tokens, text = call
    queries = tokens if merge.queries is None else merge.queries.merge(tokens)
    keys = tokens if merge.keys is None else merge.keys.merge(tokens)
    q, k, v = heads(attn, queries, attn.to_q), heads(attn, keys, attn.to_k), heads(attn, keys, attn.to_v)
    q, k = normed(attn.norm_q, q), normed(attn.norm_k, k)
    sizes = torch.ones(keys.shape[:2]) if merge.keys is None else merge.keys.sizes
    if text is not None:
        q = torch.cat([q, normed(attn.norm_added_q, heads(attn, text, attn.add_q_proj))], dim=2)
        k = torch.cat([k, normed(attn.norm_added_k, heads(attn, text, attn.add_k_proj))], dim=2)
        v = torch.cat([v, heads(attn, text, attn.add_v_proj)], dim=2)
        sizes = torch.cat([sizes, torch.ones(text.shape[:2])], dim=1)
    logits = q @ k.mT / q.shape[-1] ** 0.5 + sizes.log()[:, None, None, :]
    attended = (logits.softmax(dim=-1) @ v).transpose(1, 2).flatten(2)
    picture = attn.to_out[0](attended[:, : queries.shape[1]])
    picture = picture if merge.queries is None else merge.queries.unmerge(picture)
    if text is None:
        return (picture,)
    of_text = attended[:, queries.shape[1] :]
    return picture, of_text if attn.context_pre_only else attn.to_add_out(of_text)


def heads(attn: Any, x: Tensor, projection: nn.Module) -> Tensor:
    return projection(x).unflatten(2, (attn.heads, -1)).transpose(1, 2)


def normed(norm: nn.Module | None, x: Tensor) -> Tensor:
    return x if norm is None else norm(x)


def as_tuple(output: Any) -> tuple[Tensor, ...]:
    return output if isinstance(output, tuple) else (output,)


def test_merging_in_blocks_that_are_skipped_does_no_harm():
    family = FAMILIES["sd35"]
    network = family.make()
    expected = family.run(network, skip_layers=[0])
    apply_patch(network, r=1)
    assert torch.equal(family.run(network, skip_layers=[0]), expected)
    apply_patch(network, r=0.5)
    assert not torch.allclose(family.run(network, skip_layers=[0]), expected, atol=1e-4)
    assert [layer.tokens for layer in summary(network).layers] == [0, 0, 24, 24]


def test_motion_modules_are_never_merged():
    names = [layer.name for layer in summary(apply_patch(FAMILIES["animatediff"].make(), levels="all")).layers]
    assert len(names) == 7
    assert not any("motion_modules" in name for name in names)


def test_controlnet_xs_is_merged_in_both_of_its_networks():
    names = [layer.name for layer in summary(apply_patch(FAMILIES["controlnet_xs"].make())).layers]
    assert sum("base_attentions" in name for name in names) == 2
    assert sum("ctrl_attentions" in name for name in names) == 2
    assert sum(name.startswith("up_blocks.1.attentions") for name in names) == 3


def test_fused_projections_of_sd3_are_refused_and_work_again_unfused():
    family = FAMILIES["sd3"]
    network: Any = family.make()
    expected = family.run(apply_patch(network, r=0.5))
    remove_patch(network)
    network.fuse_qkv_projections()
    with pytest.raises(ValueError, match=r"transformer_blocks.0.attn has a .*FusedJointAttnProcessor2_0: merging in"):
        apply_patch(network, r=0.5)
    network.unfuse_qkv_projections()
    assert torch.equal(family.run(apply_patch(network, r=0.5)), expected)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "threshold", "clusterings"),
    [("flux", 0.2, 1), ("pixart", 0, 3), ("sd35", 0, 3), ("qwen_image", 0, 3), ("z_image", 0, 3)],
)
def test_transformers_compile_whole(name, threshold, clusterings):
    """Once with clusters that are reused, which all families do alike and which takes a second trace."""
    torch.compiler.reset()
    family = FAMILIES[name]
    network = apply_patch(family.make(), **family.half | {"r_keys": 0.25}, recluster_threshold=threshold)
    expected = [family.run(network, timestep) for timestep in TIMESTEPS[:3]]
    compiled: Any = torch.compile(network, fullgraph=True, backend="eager")
    steps = TIMESTEPS.clone()
    for timestep, output in zip(steps, expected, strict=False):
        assert torch.allclose(family.run(compiled, timestep), output, atol=1e-5)
    assert {layer.clusterings for layer in summary(compiled).layers} == {clusterings}


def sana() -> SanaTransformer2DModel:
    heads = {"num_attention_heads": 2, "attention_head_dim": 4, "num_cross_attention_heads": 2}
    widths = {"cross_attention_head_dim": 4, "cross_attention_dim": 8, "caption_channels": 8}
    return SanaTransformer2DModel(in_channels=4, out_channels=4, num_layers=1, sample_size=8, **heads, **widths)


def qwen_image_layered() -> QwenImageTransformer2DModel:
    return QwenImageTransformer2DModel(**QWEN_IMAGE, use_layer3d_rope=True)


def stable_cascade() -> StableCascadeUNet:
    blocks = ("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock")
    layers = ("down_num_layers_per_block", "up_num_layers_per_block", "down_blocks_repeat_mappers")
    return StableCascadeUNet(
        block_out_channels=(8, 8),
        num_attention_heads=(2, 2),
        **dict.fromkeys((*layers, "up_blocks_repeat_mappers"), (1, 1)),
        block_types_per_layer=(blocks, blocks),
        conditioning_dim=8,
        clip_text_pooled_in_channels=8,
        clip_seq=1,
    )


def kandinsky() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        **UNET
        | {
            "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
            "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        }
    )


def latent_upscaler() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        **UNET
        | {
            "down_block_types": ("KDownBlock2D", "KCrossAttnDownBlock2D"),
            "up_block_types": ("KCrossAttnUpBlock2D", "KUpBlock2D"),
            "mid_block_type": None,
            "block_out_channels": (32, 32),
            "norm_num_groups": None,
            "resnet_time_scale_shift": "scale_shift",
        }
    )


def stable_video_diffusion() -> UNetSpatioTemporalConditionModel:
    return UNetSpatioTemporalConditionModel(
        block_out_channels=(32, 32),
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        cross_attention_dim=8,
        num_attention_heads=(2, 2),
        layers_per_block=1,
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=12,
    )


@pytest.mark.parametrize(
    "build", [sana, qwen_image_layered, stable_cascade, kandinsky, latent_upscaler, stable_video_diffusion]
)
def test_other_models_are_refused_in_one_sentence(build):
    network = build()
    expected = f"^{type(network).__name__} has no self-attention that can be merged; supported are Stable .+ ViTs$"
    with pytest.raises(ValueError, match=expected):
        apply_patch(network)
