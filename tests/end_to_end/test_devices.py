"""Devices that need not be there: what runs on them, what crosses to the CPU, and what does not depend on defaults."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_flatten, tree_map

from atc_diffusion import ATCConfig, MergeConfig, MergeMap, ToMeConfig, agglomerate, apply_patch
from atc_diffusion.adapters import Family
from atc_diffusion.adapters.layer import Cut, ImageSlice, MergedCall
from atc_diffusion.adapters.lookup import family_of
from atc_diffusion.clustering import placement
from atc_diffusion.clustering.placement import CPU, place
from atc_diffusion.clustering.windows import cluster_windows
from atc_diffusion.testing import TinyNetwork
from tests.helpers import pretend_device
from tests.helpers.attentions import recorded_calls, recorded_results
from tests.helpers.families import FAMILIES, ROTARY
from tests.helpers.pretend_device import DEVICE, OPERATIONS, PretendDevice

CUDA = torch.device("cuda", 0)
WITH_QUERIES = [name for name, family in FAMILIES.items() if family.merges_queries]
CONFIGS = [ATCConfig.fast(), ATCConfig(r=0.5, window_size=4), ToMeConfig(r=0.5)]
# Every family merges in the same calls whatever the clustering, and every clustering is the same whatever the family.
MERGED = [*((name, ATCConfig()) for name in WITH_QUERIES), *((WITH_QUERIES[0], config) for config in CONFIGS)]
merged = pytest.mark.parametrize(
    ("name", "config"), MERGED, ids=lambda each: None if isinstance(each, str) else type(each).__name__
)


def run_on(device: torch.device, family: TinyNetwork, network: Any) -> Tensor:
    inputs = family.inputs(8, 12) | {"timestep": torch.tensor([10, 10])}
    return family.run(network, **tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, inputs))


def step(network: Any, family: TinyNetwork, config: MergeConfig | None) -> tuple[Tensor, PretendDevice]:
    """The output of a step of a copy of the network on the pretended device."""
    network = copy.deepcopy(network)
    if config is not None:
        apply_patch(network, config)
    with PretendDevice() as device, torch.no_grad():
        pretend_device.put(network)
        device.waits = 0
        return run_on(DEVICE, family, network).cpu(), device


@cache
def used_unpatched(name: str) -> set[str]:
    """The operations of a network's own step."""
    return step(FAMILIES[name].make(), FAMILIES[name], None)[1].used


@merged
def test_a_step_on_mps_needs_what_it_has_and_gives_what_the_cpu_gives(name, config):
    family = FAMILIES[name]
    network = family.make()
    try:
        own = used_unpatched(name)
    except TypeError as error:
        pytest.skip(f"this network of this diffusers does not run there: {error}")
    output, device = step(network, family, config)
    added = device.used - own
    assert added <= OPERATIONS, f"check that PyTorch 2.8 has {added - OPERATIONS} on MPS, and add them to the list"
    apply_patch(network, config)
    assert torch.allclose(output, family.run(network), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_features_travel_to_the_cpu_once_and_labels_back(dtype):
    tokens = torch.randn(2, 64, 8).to(dtype)
    with PretendDevice() as device:
        there = tokens.to(DEVICE)
        tree = cluster_windows(there, 20, (8, 8), window=4)
        assert device.waits == 1
        labels = tree.cut(20)
        assert labels.device == agglomerate(there, 20).device == DEVICE
        assert device.waits == 2
    assert torch.equal(on_cpu(labels), cluster_windows(tokens, 20, (8, 8), window=4).cut(20))


def on_cpu(x: Any) -> Tensor:
    return x.on_cpu


def test_merging_without_embedding_bag_gives_the_same_means_and_gradients():
    labels = torch.tensor([[0, 1, 0, 3], [3, 0, 1, 3]])  # and a cluster without tokens
    x = torch.randn(2, 4, 3)
    expected = MergeMap(labels, 4).merge(x)
    with PretendDevice():
        means = MergeMap(labels.to(DEVICE), 4).merge(x.to(DEVICE))
        large = MergeMap(torch.zeros(1, 1000, dtype=torch.int64, device=DEVICE), 1).merge(
            torch.full((1, 1000, 1), 6e4, dtype=torch.float16, device=DEVICE)
        )
    assert torch.allclose(on_cpu(means), expected)
    assert on_cpu(large).item() == torch.tensor(6e4, dtype=torch.float16)


def test_the_fastest_place_depends_on_device_dtype_and_size(monkeypatch):
    monkeypatch.setattr(placement, "triton_problem", lambda *_: None)
    with FakeTensorMode():
        cpu, cuda, many = torch.empty(1, 4, 3), torch.empty(1, 4, 3, device=CUDA), torch.empty(1, 9000, 3)
    assert place(cpu, "average", "cosine") == ("numba", CPU)
    assert place(cuda, "average", "cosine") == place(cuda.half(), "average", "cosine") == ("triton", CUDA)
    assert place(cuda.double(), "average", "cosine") == ("numba", CPU)
    assert place(many, "average", "cosine") == ("torch", CPU)  # needs no N x N matrix
    assert place(many, "complete", "cosine") == ("numba", CPU)
    assert place(cuda, "average", "cosine", "torch") == ("torch", CUDA)
    assert place(cuda, "average", "cosine", "scipy") == ("scipy", CPU)
    with PretendDevice():
        assert place(cpu.to(DEVICE), "ward", "euclidean") == ("numba", CPU)
        assert place(torch.empty(1, 9000, 3, device=DEVICE), "ward", "euclidean") == ("torch", CPU)


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("HAS_TRITON", False, "Triton is not installed .`pip install triton-windows` on Windows"),
        ("triton_problem", lambda *_: "the Triton kernels fail", "the Triton kernels fail; a slower backend clusters"),
    ],
)
def test_without_trusted_kernels_another_backend_clusters_what_is_on_cuda_and_says_so_once(
    monkeypatch, name, value, problem
):
    placement.triton_problem.cache_clear()
    placement.warn_once.cache_clear()
    monkeypatch.setattr(placement, name, value)
    with FakeTensorMode():
        tokens = torch.empty(1, 4, 3, device=CUDA)
        many = torch.empty(1, 9000, 3, device=CUDA)
    with pytest.warns(UserWarning, match=problem) as warned:
        places = [place(x, "average", "cosine") for x in (tokens, tokens, many)]
    assert places == [("numba", CPU), ("numba", CPU), ("torch", CUDA)]
    assert len(warned) == 1
    monkeypatch.undo()
    placement.triton_problem.cache_clear()


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", WITH_QUERIES)
def test_a_step_does_not_depend_on_the_default_dtype(name, default):
    family = FAMILIES[name]
    network = family.make()
    inputs = family.inputs(8, 12)
    apply_patch(network, ATCConfig.fast(0.3))
    expected = family.run(network, **inputs)
    with default_dtype(default):
        output = family.run(network, **inputs)
    assert torch.allclose(output, expected, atol=1e-5)


def on_cuda(x: Tensor) -> Tensor:
    """Within `FakeTensorMode`."""
    return torch.empty(x.shape, dtype=x.dtype, device=CUDA)


def fakes_cuda() -> bool:
    with FakeTensorMode():
        try:
            torch.arange(1, device=CUDA)[:, None]
        except RuntimeError:
            return False
    return True


needs_fake_cuda = pytest.mark.skipif(not fakes_cuda(), reason="this PyTorch needs a driver even for fake CUDA tensors")


@needs_fake_cuda
@merged
def test_every_tensor_of_a_step_is_on_the_networks_device(name, config):
    """Tensors of two devices do not mix in FakeTensorMode either, and reading a tensor's data raises there."""
    family = FAMILIES[name]
    inputs = family.inputs(8, 12) | {"timestep": torch.tensor([10, 10])}
    network = apply_patch(family.make(), config)
    with FakeTensorMode(), torch.no_grad():
        pretend_device.put(network, on_cuda)
        there = tree_map(lambda x: on_cuda(x) if isinstance(x, Tensor) else x, inputs)
        outputs = network(**there, return_dict=False)
    assert {x.device for x in tree_flatten(outputs)[0]} == {CUDA}


# Diffusers computes rotary embeddings with what such devices have not (float64, values that are read), so of the rotary
# families only the attentions go there.


@dataclass
class Attending:
    """A call of an attention whose keys merge."""

    family: Family
    attention: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    merge: MergedCall
    output: Any

    def again(self, attention: nn.Module, merge: MergedCall | None, move: Callable[[Tensor], Tensor]) -> Any:
        """The output of a copy of the attention where `move` takes tensors."""
        args, kwargs = tree_map(lambda x: move(x) if isinstance(x, Tensor) else x, (self.args, self.kwargs))
        if merge is not None and merge.keys is not None:
            merge = replace(merge, keys=MergeMap(move(merge.keys.labels), merge.keys.num_clusters))
            args, kwargs = self.family.merge(attention, args, kwargs, merge.image, lambda project: merge)
        return attention(*args, **kwargs)


def attending(tiny: TinyNetwork, monkeypatch: pytest.MonkeyPatch) -> Attending:
    network = apply_patch(tiny.make(), ATCConfig.fast(0.25))
    family = family_of(network)
    assert family is not None
    merges: dict[nn.Module, MergedCall] = {}
    merge = family.merge

    def record(attention: nn.Module, args: Any, kwargs: Any, image: ImageSlice, cut: Cut) -> Any:
        return merge(attention, args, kwargs, image, lambda project: merges.setdefault(attention, cut(project)))

    calls, results = recorded_calls(network), recorded_results(network)
    with monkeypatch.context() as patching:
        patching.setattr(family, "merge", record)
        tiny.run(network)
    attention = next(attention for attention, merged in merges.items() if merged.keys is not None)
    attention._forward_pre_hooks.clear()
    attention._forward_hooks.clear()
    return Attending(family, attention, *calls[attention], merges[attention], results[attention])


@pytest.mark.parametrize("name", ROTARY)
def test_an_attention_on_mps_whose_keys_merge_after_the_rotation(name, monkeypatch):
    call = attending(FAMILIES[name], monkeypatch)
    used = []
    for merge in (call.merge, None):
        there = copy.deepcopy(call.attention)
        with PretendDevice() as device, torch.no_grad():
            pretend_device.put(there)
            output = call.again(there, merge, lambda x: x.to(DEVICE))
        used.append((device.used, output))
    assert used[0][0] - used[1][0] <= OPERATIONS
    for actual, wanted in zip(tree_flatten(used[0][1])[0], tree_flatten(call.output)[0], strict=True):
        assert torch.allclose(on_cpu(actual), wanted, atol=1e-5)


@needs_fake_cuda
@pytest.mark.parametrize("name", ROTARY)
def test_every_tensor_of_an_attention_whose_keys_merge_is_on_its_device(name, monkeypatch):
    call = attending(FAMILIES[name], monkeypatch)
    with FakeTensorMode(), torch.no_grad():
        pretend_device.put(call.attention, on_cuda)
        outputs = call.again(call.attention, call.merge, on_cuda)
    assert {x.device for x in tree_flatten(outputs)[0]} == {CUDA}
