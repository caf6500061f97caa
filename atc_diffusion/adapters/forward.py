"""Checks that an attention's forward is diffusers' own, as both the processor and the forward compute attention."""

from collections.abc import Callable
from typing import Any

from atc_diffusion.adapters import Layer


def check_forward(layer: Layer) -> None:
    """Raise ValueError if the forward of the layer's attention was replaced, as HyperTile does."""
    forward = _innermost(layer.attention)
    function = getattr(forward, "__func__", forward)
    if function is not type(layer.attention).forward or not _source(function).startswith("diffusers."):
        raise ValueError(
            f"{layer.name} has its forward replaced by code of {_source(function)}, which is not known to work with"
            " merged tokens; undo that, or call remove_patch"
        )


def _source(function: Callable[..., Any]) -> str:
    """The module that defines a function; `__module__` may name that of a wrapped function."""
    return getattr(function, "__globals__", {}).get("__name__", type(function).__module__)


def _innermost(attention: Any) -> Callable[..., Any]:
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
