"""Patched networks cannot be traced: which tokens are merged depends on their values."""

import sys

import torch


def refuse_tracing() -> None:
    """Raise ValueError under `torch.export`, ONNX export, `torch.jit.trace` or `make_fx`; `torch.compile` is fine."""
    if torch.compiler.is_dynamo_compiling():
        return
    if torch.compiler.is_compiling() or torch._C._is_tracing() or _is_traced_by_fx():
        raise ValueError("a patched network cannot be exported or traced; call remove_patch first")


def _is_traced_by_fx() -> bool:
    module = sys.modules.get("torch.fx.experimental.proxy_tensor")  # or nothing is; to load it takes long
    return module is not None and module.get_proxy_mode() is not None
