"""What keeps an attention from merging: code of other packages in the place of its own, or hooks around it."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

# Hooks of diffusers, by the module that defines them, that only move or cast weights.
HARMLESS = ("diffusers.hooks.group_offloading", "diffusers.hooks.layerwise_casting")

# Those that keep the attention's output for later calls, whose clusters are others, or blur all of the queries. Keys
# may merge under them.
_NEED_ALL_QUERIES = {
    "FasterCacheBlockHook",
    "PyramidAttentionBroadcastHook",
    "SmoothedEnergyGuidanceHook",
    "TaylorSeerCacheHook",
}


@dataclass(frozen=True)
class Limit:
    """Why an attention merges less than it was asked to.

    Attributes:
        reason: what follows the attention's name, as in "has ...".
        by_hooks: whether hooks are the reason, which come and go.
        keys_merge: whether only its queries stay unmerged.
    """

    reason: str
    by_hooks: bool = False
    keys_merge: bool = False


def limit_by_hooks(attention: Any) -> Limit | None:
    """How diffusers' hooks on an attention limit merging; None: they do not.

    Those of unknown kind leave it unmerged, and so do those that skip attention: they return the values, or the tokens,
    in the place of its output, and there is nothing to save.
    """
    kinds = {type(hook) for hook in _hooks(attention) if type(hook).__module__ not in HARMLESS}
    if not kinds:
        return None
    names = ", ".join(sorted(f"{kind.__module__}.{kind.__name__}" for kind in kinds))
    known = all(kind.__module__.startswith("diffusers.") and kind.__name__ in _NEED_ALL_QUERIES for kind in kinds)
    return Limit(f"has a hook that works on all of its tokens: {names}", by_hooks=True, keys_merge=known)


def _hooks(attention: Any) -> Iterator[Any]:
    """The hooks of diffusers on an attention and its projections."""
    for module in (attention, *attention._modules.values()):
        if registry := getattr(module, "_diffusers_hook", None):
            yield from registry.hooks.values()


def replaced_code(attention: Any) -> str | None:
    """What to say of an attention whose forward is not diffusers' own, as with HyperTile; None: it is.

    Both the forward and the processor compute attention.
    """
    forward = _unhooked_forward(attention)
    function = getattr(forward, "__func__", forward)
    if function is type(attention).forward and source(function).startswith("diffusers."):
        return None
    return (
        f"has its forward replaced by code of {source(function)}, which is not known to work with merged tokens; undo"
        " that, or call remove_patch"
    )


def innermost(function: Any) -> Any:
    """The function inside partial functions and bound methods."""
    while isinstance(function, partial):
        function = function.func
    return getattr(function, "__func__", function)


def source(function: Any) -> str:
    """The module that defines a function or class; `__module__` of a function may name that of a wrapped one."""
    function = innermost(function)
    return str(getattr(function, "__globals__", {}).get("__name__") or getattr(function, "__module__", ""))


def _unhooked_forward(attention: Any) -> Any:
    """The forward inside the hooks of accelerate and diffusers (offloading, casting, caching), which only wrap it."""
    forward = attention.forward
    hooked = list(getattr(getattr(attention, "_diffusers_hook", None), "_fn_refs", ()))
    while maker := getattr(getattr(forward, "func", None), "__module__", None):
        if maker.startswith("accelerate."):
            forward = attention._old_forward
        elif maker.startswith("diffusers.hooks.") and hooked:
            reference = hooked.pop()
            forward = reference.original_forward or reference.forward
        else:
            break
    return forward
