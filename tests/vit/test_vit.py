"""Merging in timm's VisionTransformer, against a forward written out."""

import copy
import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import ResPostBlock, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from atc_diffusion import ViTConfig, agglomerate, apply_patch, merge_maps, remove_patch, summary
from atc_diffusion.clustering.baselines import dpc_knn_labels, kmedoids_labels

SIZES: dict[str, Any] = {"img_size": 20, "patch_size": 4, "embed_dim": 16, "depth": 4, "num_heads": 2, "num_classes": 5}
MODELS: dict[str, Callable[[], VisionTransformer]] = {
    "deit": lambda: VisionTransformer(**SIZES),
    "distilled": lambda: VisionTransformerDistilled(**SIZES),
    "registers": lambda: VisionTransformer(**SIZES, reg_tokens=3, init_values=0.5, qk_norm=True),
    "mae": lambda: VisionTransformer(**SIZES, class_token=False, global_pool="avg"),
}
MERGING = ("atc", "tome", "kmedoids", "dpc_knn")
METHODS = (*MERGING, "topk", "evit")
TWICE: dict[str, Any] = {"r": 0.6, "blocks": (2, 3)}


def make(name: str = "deit") -> VisionTransformer:
    """Weights large enough that every merge shows in the output."""
    model = MODELS[name]().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def pictures(count: int = 2) -> Tensor:
    return torch.randn(count, 3, 20, 20, generator=torch.Generator().manual_seed(1))


def close(a: Tensor, b: Tensor) -> bool:
    """Equal but for rounding in float64."""
    return torch.allclose(a, b, atol=1e-9)


# The reference: one picture at a time, clusters as lists of patches.


def attend(block: Any, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens `[N, C]` behind the attention's residual, keys `[H, N, D]` and probabilities `[H, N, N]`."""
    attn = block.attn
    q, k, v = attn.qkv(block.norm1(x)).unflatten(1, (3, attn.num_heads, -1)).permute(1, 2, 0, 3)
    q, k = attn.q_norm(q), attn.k_norm(k)
    probabilities = (q @ k.mT * attn.scale + bias).softmax(dim=-1)
    return x + block.ls1(attn.proj((probabilities @ v).transpose(0, 1).flatten(1))), k, probabilities


def tome_labels(features: Tensor, prefix: int, num_clusters: int) -> Tensor:
    """Bolya et al. 2023, section 3: tokens at even places of the sequence join some of those at odd places."""
    unit = F.normalize(features.float(), dim=1)
    sources = [i for i in range(len(unit)) if (i + prefix) % 2 == 0]
    targets = [i for i in range(len(unit)) if (i + prefix) % 2 == 1]
    best = {i: max(targets, key=lambda j: float(unit[i] @ unit[j])) for i in sources}
    merged = sorted(sources, key=lambda i: -float(unit[i] @ unit[best[i]]))[: len(unit) - num_clusters]
    roots = [best[i] if i in merged else i for i in range(len(unit))]
    return torch.tensor([list(dict.fromkeys(roots)).index(root) for root in roots])


def labels_of(method: str, features: Tensor, received: Tensor, prefix: int, count: int) -> Tensor:
    if method == "tome":
        return tome_labels(features, prefix, count)
    if method == "kmedoids":
        return kmedoids_labels(features[None], count, received[None])[0]
    return (agglomerate if method == "atc" else dpc_knn_labels)(features[None], count)[0]


def reference_merging(model: Any, picture: Tensor, method: str, kept: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Logits, and the last block's tokens at every patch `[N, C]`."""
    prefix = model.num_prefix_tokens
    x = model._pos_embed(model.patch_embed(picture[None]))[0]
    clusters = [[i] for i in range(len(x) - prefix)]
    for block, count in zip(model.blocks, kept, strict=True):
        sizes = torch.tensor([1] * prefix + [len(cluster) for cluster in clusters])
        x, keys, probabilities = attend(block, x, sizes.log())
        if count < len(clusters):
            received = probabilities.mean(dim=0).sum(dim=0)[prefix:]
            labels = labels_of(method, keys[:, prefix:].mean(dim=0), received, prefix, count)
            weighted = x[prefix:] * sizes[prefix:, None]
            parts = [(labels == label).nonzero().flatten().tolist() for label in range(count)]
            clusters = [[patch for part in each for patch in clusters[part]] for each in parts]
            means = [weighted[each].sum(dim=0) / len(own) for each, own in zip(parts, clusters, strict=True)]
            x = torch.cat([x[:prefix], torch.stack(means)])
        x = x + block.ls2(block.mlp(block.norm2(x)))
    patches = torch.empty(sum(map(len, clusters)), x.shape[1], dtype=x.dtype)
    for token, cluster in zip(x[prefix:], clusters, strict=True):
        patches[cluster] = token
    sequence = torch.cat([x[:prefix], patches])
    return model.forward_head(model.norm(sequence)[None])[0], patches


def reference_pruning(model: Any, picture: Tensor, method: str, kept: tuple[int, ...]) -> Tensor:
    """Logits where pruned tokens are gone (Top-K), or fused into one weighted by their attention (EViT)."""
    x = model._pos_embed(model.patch_embed(picture[None]))[0]
    left = len(x) - 1
    for block, count in zip(model.blocks, kept, strict=True):
        x, _, probabilities = attend(block, x, torch.zeros(()))
        if count < left:
            scores, left = probabilities[:, 0, 1:].mean(dim=0), count
            order = scores.argsort(descending=True)
            best, rest = x[1:][order[:count]], x[1:][order[count:]]
            fused = [(scores[order[count:], None] * rest).sum(dim=0, keepdim=True)] if method == "evit" else []
            x = torch.cat([x[:1], best, *fused])
        x = x + block.ls2(block.mlp(block.norm2(x)))
    return model.forward_head(model.norm(x)[None])[0]


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", MERGING)
@pytest.mark.parametrize("choice", [TWICE, {"t": 4, "schedule": "linear"}])
def test_merging_equals_the_forward_written_out(name, method, choice):
    model, config = make(name).double(), ViTConfig(method=method, **choice)
    before = model(pictures().double())
    apply_patch(model, config)
    kept = config.kept(25, 4)
    logits, features = model(pictures().double()), model.forward_features(pictures().double())
    for i, picture in enumerate(pictures().double()):
        detached = copy.deepcopy(MODELS[name]()).double().eval()
        detached.load_state_dict(model.state_dict())
        expected, patches = reference_merging(detached, picture, method, kept)
        assert close(logits[i], expected)
        assert close(features[i, model.num_prefix_tokens :], model.norm(patches))
    assert (logits - before).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("method", ["topk", "evit"])
def test_pruning_equals_the_forward_written_out(method):
    model, original = make().double(), make().double()
    original.load_state_dict(model.state_dict())
    apply_patch(model, config := ViTConfig(method=method, **TWICE))
    kept = config.kept(25, 4)
    logits = model(pictures().double())
    for i, picture in enumerate(pictures().double()):
        assert close(logits[i], reference_pruning(original, picture, method, kept))


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_keeping_all_and_removal_change_no_bit(name):
    model = make(name)
    before, state = model(pictures()), list(model.state_dict())
    apply_patch(model, ViTConfig(r=1, blocks=(1, 4)))
    assert torch.equal(model(pictures()), before)
    remove_patch(model)
    apply_patch(model, ViTConfig(**TWICE))
    assert not torch.equal(model(pictures()), before)
    assert list(model.state_dict()) == state
    remove_patch(model)
    assert torch.equal(model(pictures()), before)


@pytest.mark.parametrize("depth", [4, 12, 24])
@pytest.mark.parametrize("t", [1, 8, 16])
def test_schedules_are_equations_4_and_5(depth, t):
    assert ViTConfig(t=t).removed(depth) == (t,) * depth
    linear = ViTConfig(t=t, schedule="linear").removed(depth)
    assert linear == tuple(int(2 * t - 2 * t * l / (depth - 1) + 1e-9) for l in range(depth))  # noqa: E741
    assert t * depth - depth < sum(linear) <= t * depth  # each of the floors loses less than one token
    assert linear[0] == 2 * t
    assert linear[-1] == 0


@pytest.mark.parametrize("schedule", ["constant", "linear"])
def test_schedules_leave_what_they_do_not_remove(schedule):
    config = ViTConfig(t=5, schedule=schedule)
    kept = (25, *config.kept(25, depth=4))
    assert [before - after for before, after in itertools.pairwise(kept)] == list(config.removed(4))


@pytest.mark.parametrize(("r", "counts"), [(0.25, (49, 12, 3)), (0.5, (98, 49, 24)), (0.7, (137, 96, 67))])
def test_kept_tokens_are_those_of_the_papers_stages(r, counts):
    kept = ViTConfig(r=r).kept(196, depth=12)
    assert [kept[i] for i in (2, 3, 6, 9, 11)] == [196, *counts, counts[-1]]


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("normed", [True, False])
def test_intermediate_feature_maps_have_all_patches(method, normed):
    model = make()
    apply_patch(model, ViTConfig(method=method, **TWICE))
    maps = model.forward_intermediates(pictures(), norm=normed, intermediates_only=True)
    assert [tuple(each.shape) for each in maps] == [(2, 16, 5, 5)] * 4
    extra = method in ("topk", "evit")
    for feature_map, kept in zip(maps, (25, 15 + extra, 9 + extra, 9 + extra), strict=True):
        assert [len(each.flatten(1).T.unique(dim=0)) for each in feature_map] == [kept] * 2


@torch.no_grad()
def test_intermediate_features_are_those_of_the_forward():
    model = make()
    apply_patch(model, ViTConfig(**TWICE))
    final, maps = model.forward_intermediates(pictures(), output_fmt="NLC", norm=True)
    assert torch.equal(final, model.forward_features(pictures()))
    assert torch.equal(maps[-1], final[:, 1:])


@pytest.mark.parametrize("method", METHODS)
def test_training_reaches_every_weight_and_checkpoints_give_the_same_gradients(method):
    model = make()
    apply_patch(model.train(), ViTConfig(method=method, **TWICE))
    gradients = []
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        model.zero_grad()
        model(pictures()).square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == dict(model.named_parameters()).keys()
    for name, gradient in gradients[0].items():
        assert gradient.isfinite().all()
        assert torch.allclose(gradient, gradients[1][name], rtol=1e-4, atol=1e-5)


def test_gradients_are_those_of_the_forward_written_out():
    model = make("mae").double()
    original = copy.deepcopy(model)
    apply_patch(model, config := ViTConfig(**TWICE))
    kept = config.kept(25, 4)
    model(pictures(1).double()).square().sum().backward()
    reference_merging(original, pictures(1)[0].double(), "atc", kept)[0].square().sum().backward()
    for gradient, expected in zip(model.parameters(), original.parameters(), strict=True):
        assert torch.allclose(gradient.grad, expected.grad, rtol=1e-8)


@torch.no_grad()
def test_a_deep_copy_has_its_own_patch():
    model = make()
    before = model(pictures())
    apply_patch(model, ViTConfig(**TWICE))
    merged, twin = model(pictures()), copy.deepcopy(model)
    remove_patch(model)
    assert torch.equal(model(pictures()), before)
    assert torch.equal(twin(pictures()), merged)


@torch.no_grad()
def test_threads_share_a_model():
    model = make()
    apply_patch(model, ViTConfig(**TWICE))
    batches = [torch.randn(1 + i % 3, 3, 20, 20) for i in range(24)]
    expected = [model(batch) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        outputs = list(pool.map(torch.no_grad()(model), batches))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(outputs, expected, strict=True))


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("method", METHODS)
def test_the_whole_model_compiles_and_threads_share_it(method):
    model = make()
    model.blocks = model.blocks[:2]  # what takes time here is tracing
    apply_patch(model, ViTConfig(method=method, r=0.6, blocks=(1, 2)))
    batches = [torch.randn(2, 3, 20, 20) for _ in range(4)]
    expected = [model(batch) for batch in batches]
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    outputs = [compiled(batches[0])]
    with ThreadPoolExecutor(2) as pool:
        outputs += pool.map(torch.no_grad()(compiled), batches[1:])
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(outputs, expected, strict=True))


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiled_model_trains():
    model = make()
    apply_patch(model, ViTConfig(**TWICE))
    gradients = []
    for forward in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        forward(pictures()).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-4) for a, b in zip(*gradients, strict=True))


@torch.no_grad()
def test_half_precision_and_autocast_stay_near():
    model = VisionTransformer(**SIZES).eval()  # timm's own small weights
    apply_patch(model, ViTConfig(t=2))
    expected = model(pictures())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(model(pictures()).float(), expected, atol=0.05)
    assert torch.allclose(model.bfloat16()(pictures().bfloat16()).float(), expected, atol=0.05)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give either r, .* or t, .*; got r=None, t=None"),
        ({"r": 0.5, "t": 3}, "give either r, .*; got r=0.5, t=3"),
        ({"r": 50}, r"r is the fraction of tokens kept, in \(0, 1\], got 50; did you mean 0.5?"),
        ({"r": 0}, "got 0$"),
        ({"t": 0}, "t must be a number of tokens from 1 up, got 0"),
        ({"r": 0.5, "blocks": (0, 3)}, r"blocks must number blocks from 1 up, such as \(4, 7, 10\), got \(0, 3\)"),
        ({"r": 0.5, "blocks": []}, r"blocks must number blocks from 1 up, .*, got \[\]"),
        ({"r": 0.5, "blocks": None}, "blocks must number blocks from 1 up, .*, got None"),
        ({"r": True}, "got True$"),
        ({"r": 0.5, "method": "atcc"}, "method must be one of 'atc', .*, got 'atcc'"),
        ({"t": 2, "schedule": "cosine"}, "schedule must be one of 'constant', 'linear', got 'cosine'"),
        ({"r": 0.5, "linkage": "centroid"}, "linkage must be one of"),
        ({"r": 0.5, "linkage": "ward", "method": "tome"}, "linkage='ward' is for method='atc', got method='tome'"),
        ({"r": 0.25, "method": "tome"}, "method='tome' keeps at least half of the tokens, got r=0.25"),
    ],
)
def test_bad_choices_are_refused_in_one_sentence(options, message):
    with pytest.raises(ValueError, match=message):
        ViTConfig(**options)


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (lambda: nn.Linear(2, 2), {"t": 2}, "for timm's VisionTransformer .*, got Linear"),
        (lambda: VisionTransformer(**SIZES, block_fn=ResPostBlock), {"t": 2}, "for timm's Block .*, got ResPostBlock"),
        (MODELS["deit"], {"r": 0.5}, r"blocks=\(4, 7, 10\), but the model has blocks 1 to 4"),
        (MODELS["mae"], {"t": 2, "method": "topk"}, "method='topk' ranks tokens by a class token .*global_pool='avg'"),
    ],
)
def test_models_that_do_not_fit_are_refused_before_anything_changes(model, options, message):
    with pytest.raises(ValueError, match=message):
        apply_patch(model(), ViTConfig(**options))


def test_masks_over_all_tokens_are_refused():
    model = make()
    apply_patch(model, ViTConfig(t=2))
    with pytest.raises(ValueError, match="attn_mask and is_causal apply to all tokens"):
        model(pictures(), attn_mask=torch.zeros(26, 26))


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["deit", "registers"])
def test_the_summary_says_how_many_patches_each_attention_sees(name, method):
    model, seen = make(name), []
    for block in model.blocks:
        block.attn.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    apply_patch(model, config := ViTConfig(method=method, **TWICE))
    model(pictures())
    layers = summary(model).layers
    assert [layer.kept for layer in layers] == [(count - model.num_prefix_tokens,) for count in seen]
    assert [layer.clusterings for layer in layers] == [0, 1, 1, 0]
    assert {layer.tokens for layer in layers} == {25}
    assert 0 < summary(model).work_saved < 1
    lines = str(summary(model)).splitlines()
    assert lines[0] == str(config)
    assert lines[2].split() == ["blocks.0.attn", "4", "25", "25", "25", "0"]


def test_the_clusters_of_a_vision_transformer_are_not_recorded():
    model = apply_patch(make(), ViTConfig(**TWICE))
    with pytest.raises(
        ValueError, match=r"in a vision transformer, patches of one cluster have equal features in model"
    ):
        merge_maps(model)


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:FutureWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("config", [ViTConfig(**TWICE), ViTConfig(t=2)])
def test_export_and_tracing_are_refused_in_one_sentence(config):
    model = apply_patch(make(), config)
    message = "a patched network cannot be exported or traced; call remove_patch first"
    with pytest.raises(ValueError, match=message):
        torch.jit.trace(model, pictures())
    with pytest.raises(Exception, match=message):
        torch.export.export(model, (pictures(),), strict=False)
