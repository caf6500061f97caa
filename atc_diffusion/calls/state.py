"""What a network's output depends on besides its arguments, and foreign code in it that may have to see each step.

A fingerprint is read at every call, in milliseconds: everything that is slow to find is found again only where the
network's modules have been exchanged.
"""

import operator
from collections.abc import Hashable, Iterable, Iterator
from itertools import chain
from typing import Any, get_args

import torch
from torch import Tensor, nn

from atc_diffusion.adapters.obstacles import HARMLESS, innermost, source
from atc_diffusion.calls.inputs import Setting

# Whose hooks and replaced forwards only move, cast, wrap or compile, and whose processors keep nothing between steps.
_KNOWN = ("atc_diffusion.", "accelerate.", "torch.", "peft.")
_KNOWN_HOOKS = (*_KNOWN, *HARMLESS, "diffusers.hooks.hooks")
_KNOWN_PROCESSORS = (*_KNOWN, "diffusers.models.")  # those of diffusers' pipelines store what they see
_LIBRARIES = (*_KNOWN, "diffusers.", "transformers.")  # whose classes may have a forward of another file of theirs
_SAMPLES = 4  # values of each weight that are read
_STEERING = (*get_args(Setting), tuple)  # types; a tuple of them is quicker to ask for than a union
_ADAPTER = ("scaling", "_disable_adapters", "_active_adapter", "merged_adapters")


class NetworkState:
    """Reads the state of one network.

    Args:
        network: the network; what hangs on it alone, not on its submodules, sees every call in any case.
    """

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        self._structure: tuple[int, ...] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return NetworkState, (self._network,)

    def fingerprint(self, in_place: bool) -> Hashable:
        """Equal as long as weights, buffers, adapters, processors and the modules' own attributes stay as they are.

        Args:
            in_place: notice writes that PyTorch does not count too, by reading some values of each weight, for which
                the CPU has to wait until a GPU has caught up.
        """
        self._refresh()
        weights = [x for x in chain.from_iterable(map(dict.values, self._weights)) if x is not None]
        return (
            self._structure,
            tuple(map(version, weights)),
            () if self._moved else tuple(map(id, weights)),
            self._values(weights) if in_place else (),
            tuple(map(type, self._modules)),
            tuple(_plain(module.__dict__.get(name)) for module in self._adapted for name in _ADAPTER),
            self._own_attributes(),
            tuple(_settings(module.processor) for module in self._with_processor),
        )

    def stranger(self) -> str:
        """The first hook, processor or replaced forward that may count steps or read features; "" if there is none."""
        self._refresh()
        return next(self._strangers(), "")

    def _refresh(self) -> None:
        """Find again what hangs where, if modules were exchanged."""
        if self._structure is not None and self._structure == self._ids():
            return
        modules = [self._network]
        for module in modules:  # which grow meanwhile
            modules += [child for child in module._modules.values() if child is not None]
        self._modules = modules
        self._children = [module._modules for module in modules]
        self._weights: list[dict[str, Any]] = [x for each in modules for x in (each._parameters, each._buffers)]
        self._with_processor = [module for module in modules if getattr(module, "processor", None) is not None]
        self._adapted = [module for module in modules if "_active_adapter" in module.__dict__]
        self._attributes = [(module.__dict__, name) for module in modules for name in _plain_names(module)]
        self._last_values: list[Any] = []
        self._last_plain: Hashable = ()
        # Weights that are loaded for a call lie elsewhere each time.
        self._moved = any("_hf_hook" in module.__dict__ or "_diffusers_hook" in module.__dict__ for module in modules)
        self._views: tuple[Hashable, list[Tensor]] = (None, [])
        self._structure = self._ids()

    def _ids(self) -> tuple[int, ...]:
        return tuple(map(id, chain.from_iterable(map(dict.values, self._children))))

    def _own_attributes(self) -> Hashable:
        """The values of the modules' own attributes; thousands, of which hardly any ever changes."""
        values = [attributes.get(name) for attributes, name in self._attributes]
        if len(values) != len(self._last_values) or not all(map(operator.is_, values, self._last_values)):
            self._last_values, self._last_plain = values, tuple(map(_plain, values))
        return self._last_plain, tuple(len(module.__dict__) for module in self._modules)

    def _values(self, weights: list[Any]) -> Hashable:
        """Some values of each weight, which show writing past PyTorch's count of versions, and where weights lie."""
        kinds = nn.Parameter, Tensor
        plain = [x for x in weights if type(x) in kinds and not x.is_meta and x.numel() and x.itemsize > 1]
        places = tuple(x.data_ptr() for x in plain)
        if self._views[0] != places:
            self._views = places, list(map(_samples, plain))
        return () if self._moved else places, _read(self._views[1])

    def _strangers(self) -> Iterator[str]:
        kinds: set[Any] = set(map(type, self._modules))
        for kind in kinds:
            if not is_own_forward(kind):
                yield f"the forward {_name(kind.forward)}"
        for module in self._with_processor:
            kind = type(module.processor)
            if not _is_from(_KNOWN_PROCESSORS, kind):
                yield f"the attention processor {_name(kind)}"
        of_all = nn.modules.module
        yield from _foreign_hooks(of_all._global_forward_pre_hooks.values(), of_all._global_forward_hooks.values())
        for module in self._modules[1:]:  # not the network itself
            attributes = module.__dict__
            registry = attributes.get("_diffusers_hook")
            of_diffusers = map(type, registry.hooks.values()) if registry else ()
            hooks = attributes["_forward_hooks"].values(), attributes["_forward_pre_hooks"].values()
            yield from _foreign_hooks(*hooks, of_diffusers)
            forward = attributes.get("forward")  # its own one is there where others have put it back
            is_own = forward is None or innermost(forward) is type(module).forward
            if not is_own and not _is_from(_KNOWN_HOOKS, forward):
                yield f"the forward {_name(forward)}"


def _foreign_hooks(*hooks: Iterable[Any]) -> Iterator[str]:
    return (f"the hook {_name(hook)}" for hook in chain(*hooks) if not _is_from(_KNOWN_HOOKS, hook))


def _plain(value: Any) -> Hashable:
    """A value that can be compared, of nested lists, dictionaries, numbers and small tensors; else its identity."""
    if isinstance(value, dict):
        return tuple((key, _plain(each)) for key, each in value.items())
    if isinstance(value, list | tuple):
        return tuple(map(_plain, value))
    if isinstance(value, Setting):
        return value
    return (id(value), version(value)) if isinstance(value, Tensor) else id(value)


def version(x: Tensor) -> int:
    """How often a tensor was written to, as far as PyTorch counts that."""
    return 0 if x.is_inference() else x._version


def _settings(processor: Any) -> Hashable:
    """Which processor it is, and its settings, such as the scales of an IP-Adapter."""
    attributes = getattr(processor, "__dict__", {})
    settings = tuple((name, _plain(value)) for name, value in attributes.items() if not name.startswith("_"))
    return id(processor), settings


def _plain_names(module: nn.Module) -> Iterator[str]:
    """The attributes by which a module's class may steer it, such as FreeU's factors or a scale."""
    for name, value in module.__dict__.items():
        if not name.startswith("_") and name != "training" and isinstance(value, _STEERING):
            yield name


def _samples(weight: Tensor) -> Tensor:
    """A view of the first value of a weight, the last, and some between."""
    x = weight.detach()
    count = min(x.numel(), x.untyped_storage().nbytes() // x.itemsize - x.storage_offset())
    return x.as_strided((min(_SAMPLES, count),), (max((count - 1) // (_SAMPLES - 1), 1),))


def _read(views: list[Tensor]) -> tuple[float, ...]:
    """The values of views, read with one wait for each device and dtype."""
    kinds: dict[Hashable, list[Tensor]] = {}
    for view in views:
        kinds.setdefault((view.device, view.dtype), []).append(view)
    return tuple(chain.from_iterable(torch.cat(each).float().tolist() for each in kinds.values()))


def is_own_forward(kind: type) -> bool:
    """Whether a class still has the forward that it was written with, or one of the library that it is of."""
    owner = next(base for base in kind.__mro__ if "forward" in vars(base))
    forward = vars(owner)["forward"]
    return source(forward) == owner.__module__ or _is_from(_LIBRARIES, forward)


def _is_from(packages: tuple[str, ...], function: Any) -> bool:
    return f"{source(function)}.".startswith(packages)


def _name(function: Any) -> str:
    function = innermost(function)
    return f"{source(function)}.{getattr(function, '__qualname__', type(function).__name__)}"
