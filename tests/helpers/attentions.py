"""The attentions of a network, and what they were called with and returned."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn


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


def softmax_attention(attn: Any, queries: Tensor, keys: Tensor, mask: Tensor) -> Tensor:
    """Attention written out, from `queries` `[B, Q, C]` to `keys` `[B, K, C]` with a mask `[B, 1, K]`."""
    q, k, v = (
        project(x).unflatten(2, (attn.heads, -1)).transpose(1, 2)
        for project, x in ((attn.to_q, queries), (attn.to_k, keys), (attn.to_v, keys))
    )
    weights = (q @ k.mT * q.shape[-1] ** -0.5 + mask[:, None]).softmax(dim=-1)
    return attn.to_out[0]((weights @ v).transpose(1, 2).flatten(2))
