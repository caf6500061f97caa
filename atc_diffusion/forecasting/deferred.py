"""Puts off the calls of a ControlNet whose network will probably not run: they are made when someone reads them.

What is put off looks like the tensors that the ControlNet returns. A network that is forecast never reads them. Whoever
does, such as a caller that keeps them for a later step, gets what the ControlNet returns.
"""

import threading
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from atc_diffusion.calls.inputs import Inputs

MAX_CONDITIONS = 256  # that were seen computed; a loop over more of them forgets the oldest


class DeferredTensor(Tensor):
    """A tensor whose values are made when they are read first.

    Sums and products of such tensors, as of several ControlNets, are put off too.
    """

    _make: Callable[[], Tensor] | None
    _value: Tensor | None
    _derived: list["weakref.ref[DeferredTensor]"]

    @staticmethod
    def __new__(cls, like: Tensor, device: torch.device, make: Callable[[], Tensor]) -> "DeferredTensor":
        made = Tensor._make_wrapper_subclass(cls, like.size(), like.stride(), dtype=like.dtype, device=device)
        made._make, made._value, made._derived = make, None, []
        return made

    def realized(self) -> Tensor:
        if self._value is None:
            assert self._make is not None
            self._value, self._make = self._make(), None
        return self._value

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # PyTorch annotates what disables it
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func in _PUT_OFF and _are_alike(*args[:2]):
            return args[0]._combined(func, args[1])
        if func._schema.is_mutable:
            tree_map_only(DeferredTensor, _realize_derived, (args, kwargs))
        return func(*realized(args), **realized(kwargs or {}))

    def _combined(self, func: Any, other: Any) -> "DeferredTensor":
        """The sum or product of this and another, put off; in the place of this one if `func` works in place."""
        if func._schema.is_mutable:
            _realize_derived(self)
            made, before = self, DeferredTensor(self, self.device, self.realized)
            before._make, before._value = self._make, self._value
        else:
            before = self
            made = DeferredTensor(self, self.device, self.realized)
        made._make, made._value = lambda: func(*realized((before, other))), None
        for each in (before, other):
            if isinstance(each, DeferredTensor):
                each._derived.append(weakref.ref(made))
        return made


_aten = torch.ops.aten
_PUT_OFF = (_aten.add.Tensor, _aten.mul.Tensor, _aten.add_.Tensor, _aten.mul_.Tensor)


def _are_alike(x: Any, y: Any) -> bool:
    """Whether two things can be added without being known: tensors of one shape that are put off, or a number."""
    if not isinstance(x, DeferredTensor):
        return False
    return isinstance(y, int | float) or (isinstance(y, DeferredTensor) and y.shape == x.shape)


def realized(values: Any) -> Any:
    """Nested values with tensors that have been made."""
    return tree_map_only(DeferredTensor, DeferredTensor.realized, values)


def is_deferred(values: Any) -> bool:
    """Whether there is something among nested values that is put off."""
    return any(isinstance(leaf, DeferredTensor) for leaf in tree_leaves(values))


def _realize_derived(tensor: DeferredTensor) -> None:
    """Make what is to be made of a tensor before that changes."""
    for reference in tensor._derived:
        if (derived := reference()) is not None:
            derived.realized()


class Deferrals:
    """The calls of a ControlNet in one run."""

    def __init__(self) -> None:
        self._computed: list[Inputs] = []
        self._returned: dict[object, Any] = {}

    def put_off(self, inputs: Inputs, call: partial[Any], owner: object) -> Any:
        """What the `call` of an `owner` returns, put off; None if no call with these conditions was computed yet."""
        template = self._returned.get(inputs.kind)
        if template is None or not any(earlier.same_conditions(inputs) for earlier in self._computed):
            return None
        made = _Made(call, owner)
        leaves, spec = tree_flatten(template)
        put_off = [
            DeferredTensor(leaf, inputs.latents.device, partial(made.value, index)) for index, leaf in enumerate(leaves)
        ]
        return tree_unflatten(put_off, spec)

    def remember(self, inputs: Inputs, returned: Any) -> Any:
        """That a call with these inputs was computed; gives back what it returned."""
        if torch.is_grad_enabled():  # nothing is put off in training
            return returned
        if not any(earlier.same_conditions(inputs) for earlier in self._computed):
            self._computed = [*self._computed[1 - MAX_CONDITIONS :], inputs.clone()]
        self._returned[inputs.kind] = tree_map_only(Tensor, partial(torch.empty_like, device="meta"), returned)
        return returned


_forced = threading.local()  # `by` whose call has to be made, because someone reads what was put off


def is_forced(owner: object) -> bool:
    return getattr(_forced, "by", None) is owner


class _Made:
    """What the call of an owner returns, made once; of what its arguments are now."""

    def __init__(self, call: partial[Any], owner: object) -> None:
        args, kwargs = tree_map_only(Tensor, Tensor.clone, (call.args, call.keywords))
        self._call = partial(call.func, *args, **kwargs)
        self._owner = owner
        self._values: list[Any] = []

    def value(self, index: int) -> Any:
        if not self._values:
            before, _forced.by = getattr(_forced, "by", None), self._owner
            try:
                with torch.no_grad():
                    self._values = tree_leaves(self._call())
            finally:
                _forced.by = before
        return self._values[index]
