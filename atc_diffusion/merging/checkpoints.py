"""Gradient checkpoints: which call, or part of one, is made again in a backward pass."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
import torch.utils.checkpoint
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode, _pop_mode_temporarily
from torch.utils._pytree import tree_leaves

from atc_diffusion.adapters import ImageInput
from atc_diffusion.calls.position import is_transformed
from atc_diffusion.calls.stack import runs_file
from atc_diffusion.calls.state import version
from atc_diffusion.merging.call import Call, Part, present, present_call

MAX_REPEATED = 32  # calls with latents in one memory, such as a buffer that is reused; older ones are forgotten

# By the memory of an input, which a gradient checkpoint keeps until it recomputes the block or its attention.
_blocks: "WeakKeyDictionary[torch.UntypedStorage, dict[object, tuple[Call, int]]]" = WeakKeyDictionary()

# By the values of the inputs of each layer's block, in calls whose graph is alive.
_by_input: "WeakKeyDictionary[object, dict[str, WeakValueDictionary[_Digest, Call]]]" = WeakKeyDictionary()

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes
_AT_ONCE = 2**20  # values of a digest, so that it takes little memory
_ODD = 0x1E3779B97F4A7C15


def enter(part: Part, owner: object, layer: str, hidden_states: Tensor) -> Call | None:
    """The call that a layer's block or attention is in, or was in if a checkpoint recomputes it; None outside of any.

    A checkpoint around an attention alone recomputes it outside of its block.
    """
    call = present_call(owner)
    if torch.compiler.is_compiling() or is_transformed(hidden_states):
        return call
    if call is not None and not call.running and part == "attention":
        return call
    place = owner, layer, hidden_states.storage_offset(), hidden_states.shape
    if call is not None and call.running:
        times_called = call.times_called.get(layer, 0)
        _put(_blocks.setdefault(hidden_states.untyped_storage(), {}), place, (call, times_called))
        if torch.is_grad_enabled() and part == "block":
            # Checkpoints around several blocks recompute all inputs but the first.
            known = _by_input.setdefault(owner, {}).setdefault(layer, WeakValueDictionary())
            known[_Digest.of(None, [hidden_states], times_called)] = call
        return call
    found = _blocks.get(hidden_states.untyped_storage(), {}).get(place) or _by_values(owner, layer, hidden_states)
    if found is None:
        return None
    call, times_called = found
    call.times_called[layer] = times_called
    present.call, present.recalled_by = call, part
    return call


@dataclass(eq=False)
class _Digest:
    """Tells tensors apart by all of their values, which are not read before two digests are compared.

    Attributes:
        about: what must be equal besides.
        sums: `[K]` int64, one of each tensor.
        times_called: how often the layer had been called, if the tensor is the input of its block.
    """

    about: object
    sums: Tensor
    times_called: int = 0

    @classmethod
    def of(cls, about: object, tensors: Sequence[Tensor], times_called: int = 0) -> "_Digest":
        device, shapes = tensors[0].device, tuple((x.shape, x.dtype) for x in tensors)
        with unseen_by_checkpoints():
            return cls((about, device, shapes), torch.stack([_sum(x).to(device) for x in tensors]), times_called)

    def matches(self, other: "_Digest") -> bool:
        has_values = type(self.sums) is Tensor and not self.sums.is_meta
        with unseen_by_checkpoints():
            return has_values and self.about == other.about and torch.equal(self.sums, other.sums)


def _find(known: "WeakValueDictionary[_Digest, Call]", digest: _Digest) -> tuple[Call, int] | None:
    """The last call that is known by the same values, and how often the layer had been called in it."""
    for each, call in reversed(list(known.items())):
        if each.matches(digest):
            return call, each.times_called
    return None


def _sum(x: Tensor) -> Tensor:
    """Of the bits of all values, each with a weight of its own: integers have the same sum in any order."""
    bits = x.detach().flatten().view(_INTEGERS[min(x.itemsize, 8)])
    weights = torch.arange(1, min(len(bits), _AT_ONCE) + 1, device=x.device) * _ODD
    weights ^= weights >> 32
    total = torch.zeros((), dtype=torch.int64, device=x.device)
    for part in bits.split(_AT_ONCE):
        total = total * _ODD + (part * weights[: len(part)]).sum()
    return total


def _by_values(owner: object, layer: str, hidden_states: Tensor) -> tuple[Call, int] | None:
    known = _by_input.get(owner, {}).get(layer)
    return _find(known, _Digest.of(None, [hidden_states])) if known and is_in_backward() else None


def leave(part: Part) -> None:
    """End what `enter` recalled; also where a checkpoint stops a block half-way by an exception."""
    call = present.call
    if call is not None and not call.running and present.recalled_by == part:
        present.call = None


def is_in_backward() -> bool:
    """Whether a backward pass is under way: gradient checkpoints repeat calls in it, adjoint methods make new ones."""
    return torch._C._current_graph_task_id() != -1


def is_recomputed_by_torch() -> bool:
    """Whether a gradient checkpoint of PyTorch is on the stack of this thread."""
    return runs_file(torch.utils.checkpoint.__file__)


def unseen_by_checkpoints() -> AbstractContextManager[Any]:
    """Around what is done in one pass only: selective checkpoints count on the same operations in both."""
    if torch.compiler.is_compiling():
        return nullcontext()
    is_selective = type(_get_current_dispatch_mode()).__module__ == torch.utils.checkpoint.__name__
    return _pop_mode_temporarily() if is_selective else nullcontext()


class Memory:
    """What calls of one network merged, by their arguments, for gradient checkpoints that repeat whole calls.

    A checkpoint keeps the latents, or the graph that it will recompute: each call is remembered as long as either.
    """

    def __init__(self) -> None:
        self._by_latents: WeakKeyDictionary[torch.UntypedStorage, dict[tuple[object, ...], Call]] = WeakKeyDictionary()
        self._by_value: WeakValueDictionary[_Digest, Call] = WeakValueDictionary()

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies, and what is read from a file, remember nothing."""
        return Memory, ()

    def add(self, call: Call, image: ImageInput, time: float) -> None:
        latents = image.latents
        if is_transformed(latents):
            return
        _put(self._by_latents.setdefault(latents.untyped_storage(), {}), _places(image, time), call)
        if torch.is_grad_enabled():
            self._by_value[_values(image, time)] = call

    def find(self, image: ImageInput, time: float) -> Call | None:
        """The call that had these arguments, or else the last one with these latents: others may be computed again."""
        if found := _find(self._by_value, _values(image, time)):
            return found[0]
        known, places = self._by_latents.get(image.latents.untyped_storage(), {}), _places(image, time)
        last = next((call for other, call in reversed(known.items()) if other[0] == places[0]), None)
        return known.get(places, last)


def keep_with_graph(call: Call, returned: Any) -> None:
    """Keep a call as long as the graph of what it returned, in whatever form."""
    for output in tree_leaves(returned):
        if isinstance(output, Tensor) and output.grad_fn is not None:
            metadata: Any = output.grad_fn.metadata
            metadata[id(call)] = call


def _put(known: dict[Any, Any], key: object, value: object) -> None:
    known[key] = value
    if len(known) > MAX_REPEATED:
        del known[next(iter(known))]


def _places(image: ImageInput, time: float) -> tuple[object, ...]:
    """Where the latents and the other arguments lie in memory."""
    latents, *others = _tensors(image)
    places = tuple((x.untyped_storage()._cdata, x.storage_offset(), x.shape, version(x)) for x in others)
    return (latents.storage_offset(), latents.shape, version(latents), time), places


def _values(image: ImageInput, time: float) -> _Digest:
    return _Digest.of(time, _tensors(image))


def _tensors(image: ImageInput) -> list[Tensor]:
    """All arguments: calls with different texts may have the same latents."""
    others = tree_leaves((image.others, image.residuals))
    return [image.latents, *(x for x in others if type(x) is Tensor and not is_transformed(x))]
