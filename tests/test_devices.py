"""Devices that need not be there: what runs on them, what crosses to the CPU, and what does not depend on defaults."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_flatten, tree_map

from atc_diffusion import ATCConfig, MergeConfig, MergeMap, ToMeConfig, agglomerate, apply_patch
from atc_diffusion.adapters import MergedCall
from atc_diffusion.clustering import placement
from atc_diffusion.clustering.placement import CPU, place
from atc_diffusion.clustering.windows import cluster_windows
from atc_diffusion.testing import TinyNetwork
from tests.helpers import pretend_device
from tests.helpers.attentions import recorded_calls, recorded_results
from tests.helpers.families import FAMILIES, ROTARY
from tests.helpers.pretend_device import DEVICE, OPERATIONS, PretendDevice

CONFIGS = [ATCConfig(), ATCConfig.fast(), ATCConfig(r=0.5, window_size=4), ToMeConfig(r=0.5)]
CUDA = torch.device("cuda", 0)
WITH_QUERIES = [name for name, family in FAMILIES.items() if family.merges_queries]


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


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
@pytest.mark.parametrize("name", WITH_QUERIES)
def test_a_step_on_mps_needs_what_it_has_and_gives_what_the_cpu_gives(name, config):
    family = FAMILIES[name]
    network = family.make()
    output, device = step(network, family, config)
    added = device.used - step(network, family, None)[1].used
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
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
@pytest.mark.parametrize("name", WITH_QUERIES)
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


def merged_call(family: TinyNetwork) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any], Tensor]:
    """An attention whose keys merge, its arguments, and what it returns."""
    network = apply_patch(family.make(), ATCConfig.fast(0.25))
    calls, results = recorded_calls(network), recorded_results(network)
    family.run(network)
    attention = next(module for module, (_, kwargs) in calls.items() if kwargs.get("merge"))
    attention._forward_pre_hooks.clear()
    attention._forward_hooks.clear()
    return attention, *calls[attention], results[attention]


def moved(arguments: Any, move: Callable[[Tensor], Tensor]) -> Any:
    def move_leaf(x: Any) -> Any:
        if isinstance(x, MergedCall):
            return replace(x, keys=x.keys and MergeMap(move(x.keys.labels), x.keys.num_clusters))
        return move(x) if isinstance(x, Tensor) else x

    return tree_map(move_leaf, arguments)


@pytest.mark.parametrize("name", ROTARY)
def test_an_attention_on_mps_whose_keys_merge_after_the_rotation(name):
    attention, args, kwargs, expected = merged_call(FAMILIES[name])
    used = []
    for given in (kwargs, kwargs | {"merge": None}):
        there = copy.deepcopy(attention)
        with PretendDevice() as device, torch.no_grad():
            pretend_device.put(there)
            output = there(*moved(args, lambda x: x.to(DEVICE)), **moved(given, lambda x: x.to(DEVICE)))
        used.append((device.used, output))
    assert used[0][0] - used[1][0] <= OPERATIONS
    for actual, wanted in zip(tree_flatten(used[0][1])[0], tree_flatten(expected)[0], strict=True):
        assert torch.allclose(on_cpu(actual), wanted, atol=1e-5)


@needs_fake_cuda
@pytest.mark.parametrize("name", ROTARY)
def test_every_tensor_of_an_attention_whose_keys_merge_is_on_its_device(name):
    attention, args, kwargs, _ = merged_call(FAMILIES[name])
    with FakeTensorMode(), torch.no_grad():
        pretend_device.put(attention, on_cuda)
        args, kwargs = moved((args, kwargs), on_cuda)
        outputs = attention(*args, **kwargs)
    assert {x.device for x in tree_flatten(outputs)[0]} == {CUDA}
