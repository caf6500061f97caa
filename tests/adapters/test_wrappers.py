"""Modules that wrap networks or their blocks, before or after patching, and replicas of whole networks."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
from peft import get_peft_model
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from atc_diffusion import apply_patch, remove_patch, summary
from tests.helpers.ecosystem import LORA
from tests.helpers.families import FAMILIES
from tests.helpers.loops import embedding, sample
from tests.helpers.unet import run

LAYERS = 3
ONE_OF_EACH = ["sd15", "pixart", "sd35", "flux", "qwen_image", "z_image"]


def test_a_unet_inside_a_peft_model(unet):
    wrapped = get_peft_model(unet, LORA).eval()
    before = run(wrapped)
    assert not torch.equal(run(apply_patch(wrapped)), before)
    assert len(summary(wrapped).layers) == LAYERS
    assert torch.equal(run(remove_patch(wrapped)), before)


class Wrapper(nn.Module):
    """As DistributedDataParallel and FSDP wrap."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


def compile_eager(module: nn.Module) -> Any:
    return torch.compile(module, backend="eager")


def wrap_peft(module: nn.Module) -> nn.Module:
    return get_peft_model(module, LORA)


@pytest.mark.parametrize(
    "wrappers", [(Wrapper, compile_eager), (compile_eager, Wrapper), (wrap_peft, Wrapper, compile_eager)]
)
def test_a_unet_inside_wrappers_in_any_order(unet, wrappers):
    wrapped = unet
    for wrap in wrappers:
        wrapped = wrap(wrapped)
    assert len(summary(apply_patch(wrapped)).layers) == LAYERS
    assert any(module._forward_hooks for module in unet.modules())
    remove_patch(wrapped)
    assert not any(module._forward_hooks for module in unet.modules())


def wrap_blocks(network: nn.Module, wrap: Callable[[nn.Module], Any]) -> None:
    """Put a wrapper around every block that has attention."""
    for blocks in list(network.modules()):
        if isinstance(blocks, nn.ModuleList):
            for i, block in enumerate(blocks):
                if any(hasattr(child, "processor") for child in block.children()):
                    blocks[i] = wrap(block)


@pytest.mark.parametrize("patch_first", [True, False])
@pytest.mark.parametrize("wrap", [checkpoint_wrapper, Wrapper])
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_blocks_inside_wrappers_merge_as_they_do_alone(name, wrap, patch_first):
    family = FAMILIES[name]
    network = family.make()
    before, expected = family.run(network), family.run(apply_patch(network, **family.half))
    layers = summary(network).layers
    if not patch_first:
        remove_patch(network)
    wrap_blocks(network, wrap)
    if not patch_first:
        apply_patch(network, **family.half)
    assert torch.equal(family.run(network), expected)
    assert [replace(layer, clusterings=1) for layer in summary(network).layers] == list(layers)
    assert torch.equal(family.run(remove_patch(network)), before)


def test_blocks_that_were_compiled_one_by_one_are_found(unet):
    layers = summary(apply_patch(unet)).layers
    wrap_blocks(remove_patch(unet), compile_eager)
    assert summary(apply_patch(unet)).layers == layers


@pytest.fixture
def _one_process(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, init_method=f"file://{tmp_path / 'store'}")
    yield
    torch.distributed.destroy_process_group()


def shard(network: nn.Module) -> Any:
    mesh = init_device_mesh("cpu", (1,))
    wrap_blocks(network, lambda block: fully_shard(block, mesh=mesh))
    return fully_shard(network, mesh=mesh)


def shard_in_wrappers(network: nn.Module) -> Any:
    options: dict[str, Any] = {"device_id": torch.device("cpu"), "use_orig_params": True}
    wrap_blocks(network, lambda block: FullyShardedDataParallel(block, **options))
    return FullyShardedDataParallel(network, **options)


def trained(model: Any) -> Tensor:
    """The output after one step of training."""
    timestep = torch.tensor([500])[0]
    model(sample(2), timestep, embedding(2)).sample.square().mean().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    return model(sample(2), timestep, embedding(2)).sample.detach()


@pytest.mark.usefixtures("_one_process")
@pytest.mark.parametrize("patch_first", [True, False])
@pytest.mark.parametrize("wrap", [shard, shard_in_wrappers, nn.parallel.DistributedDataParallel])
def test_training_over_several_processes(unet, wrap, patch_first):
    unet.train().requires_grad_(True)
    expected = trained(apply_patch(copy.deepcopy(unet), r=0.5))
    if patch_first:
        apply_patch(unet, r=0.5)
    model = wrap(unet)
    output = trained(model if patch_first else apply_patch(model, r=0.5))
    assert torch.allclose(getattr(output, "full_tensor", lambda: output)(), expected, atol=1e-6)


def replica(network: nn.Module, factor: float) -> nn.Module:
    """What `nn.DataParallel` makes for another GPU, here with weights `factor` times as large."""
    copies = {module: module._replicate_for_data_parallel() for module in network.modules()}
    for module, twin in copies.items():
        for name, child in module.named_children():
            twin._modules[name] = copies[child]
        for name, parameter in module._parameters.items():
            setattr(twin, name, None if parameter is None else parameter.detach() * factor)
    return copies[network]


@pytest.mark.parametrize("features", ["keys", "values", "hidden_states"])
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_replica_runs_its_own_modules(name, features):
    family = FAMILIES[name]
    network, other = family.make(), family.make()
    other.load_state_dict(network.state_dict() | {name: 1.1 * weight for name, weight in network.named_parameters()})
    expected = family.run(apply_patch(other, **family.half, features=features))
    ran: list[nn.Module] = []
    for module in network.modules():
        module.register_forward_pre_hook(lambda module, args: ran.append(module))
    twin = replica(apply_patch(network, **family.half, features=features), factor=1.1)
    assert torch.allclose(family.run(twin, 10), expected, atol=1e-5)
    assert ran
    assert not set(ran) & set(network.modules())
