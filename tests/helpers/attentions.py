"""The attentions of a network, and what they were called with and returned."""

from collections.abc import Iterator
from typing import Any

from torch import nn


def recorded_calls(network: nn.Module) -> dict[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]]:
    """What every attention is called with; if the network is patched by now, with what is merged."""
    calls: dict[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]] = {}
    for module in attentions(network):
        module.register_forward_pre_hook(
            lambda module, args, kwargs: calls.update({module: (args, kwargs)}), with_kwargs=True
        )
    return calls


def recorded_results(network: nn.Module) -> dict[nn.Module, Any]:
    results: dict[nn.Module, Any] = {}
    for module in attentions(network):
        module.register_forward_hook(lambda module, args, output: results.update({module: output}))
    return results


def attentions(network: nn.Module) -> Iterator[Any]:
    return (module for module in network.modules() if hasattr(module, "processor"))
