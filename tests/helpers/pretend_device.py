"""A device named "mps" on any machine: it computes on the CPU, and refuses float64, which Apple's does not have.

Its tensors are of a class of their own: `x.device` is "mps", data cross to the CPU and back only where the code says
so, tensors of two devices do not mix, and every operation is noted. What real kernels compute only a Mac can tell.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

DEVICE, CPU = torch.device("mps:0"), torch.device("cpu")

# What merging adds to a network's own operations; PyTorch 2.8 has each of them on MPS, or composes it of such, as
# `native_functions.yaml` in its macOS wheel says.
OPERATIONS = {
    "__rshift__",
    "_unsafe_view",
    "arange",
    "bitwise_and",
    "bitwise_xor",
    "bmm",
    "cat",
    "clamp",
    "clamp_min",
    "clone",
    "constant_pad_nd",
    "cumsum",
    "div",
    "embedding",
    "eq",
    "expand",
    "floor_divide",
    "full_like",
    "gather",
    "log",
    "masked_fill",
    "max",
    "nan_to_num",
    "new_ones",
    "norm",
    "ones",
    "remainder",
    "repeat",
    "scatter",
    "scatter_",
    "scatter_reduce",
    "searchsorted",
    "slice",
    "sort",
    "split_with_sizes",
    "stack",
    "sub",
    "unsqueeze",
}

# These ask a tensor for its device in C++, past the property of `PretendedTensor`, so they run on the CPU tensor.
ASK_FOR_THE_DEVICE = (
    Tensor.__getitem__,
    Tensor.__setitem__,
    Tensor.contiguous,
    Tensor.__invert__,
    F.scaled_dot_product_attention,
    F.multi_head_attention_forward,
)


class PretendedTensor(Tensor):
    """A tensor whose `device` is the pretended one; `on_cpu` is what it holds."""

    on_cpu: Tensor

    @staticmethod
    def __new__(cls, on_cpu: Tensor) -> "PretendedTensor":
        if on_cpu.dtype == torch.float64:
            raise TypeError("MPS has no float64")
        layout: Any = {"strides": on_cpu.stride(), "storage_offset": on_cpu.storage_offset()}
        return Tensor._make_wrapper_subclass(cls, on_cpu.shape, **layout, dtype=on_cpu.dtype, device=DEVICE)

    def __init__(self, on_cpu: Tensor) -> None:
        self.on_cpu = on_cpu

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in ASK_FOR_THE_DEVICE:
            return _to_device(func(*_to_cpu(args), **_to_cpu(kwargs or {})))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs or {})

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise AssertionError(f"{func} was called outside of PretendDevice")


class PretendDevice(TorchDispatchMode):
    """Within this context there is the device.

    Attributes:
        used: the names of the operations that ran on it.
        waits: how often something was read back from it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.used: set[str] = set()
        self.waits = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        target = torch.device(kwargs.get("device") or "cpu")
        tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
        here = any(isinstance(x, PretendedTensor) for x in tensors)
        if not here and target != DEVICE:
            return func(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        self.used.add(name)
        leaves = name == "_local_scalar_dense" or (kwargs.get("device") is not None and target != DEVICE)
        self.waits += leaves
        if here and name != "copy_" and any(x.ndim and not isinstance(x, PretendedTensor) for x in tensors):
            raise RuntimeError(f"{name} mixes tensors of {DEVICE} and the CPU")
        out = func(*_to_cpu(args), **_to_cpu(kwargs) | ({"device": CPU} if target == DEVICE else {}))
        if name.endswith("_") and func._schema.is_mutable:
            return args[0]
        return out if leaves else _to_device(out)


def put(network: nn.Module, move: Callable[[Tensor], Tensor] = lambda x: x.to(DEVICE)) -> nn.Module:
    """The network with its weights on the device, where `move` takes them; within `PretendDevice`."""
    for module in network.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                module._parameters[name] = nn.Parameter(move(weight), requires_grad=False)
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else move(buffer)
    return network


def _to_cpu(tree: Any) -> Any:
    return tree_map(lambda x: x.on_cpu if isinstance(x, PretendedTensor) else x, tree)


def _to_device(tree: Any) -> Any:
    return tree_map(lambda x: PretendedTensor(x) if isinstance(x, Tensor) else x, tree)
