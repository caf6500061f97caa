"""Patched networks cannot be traced: which tokens are merged depends on their values."""

import torch


def refuse_tracing() -> None:
    """Raise ValueError under `torch.export`, ONNX export or `torch.jit.trace`; `torch.compile` is fine."""
    if torch.compiler.is_dynamo_compiling():
        return
    if torch.compiler.is_compiling() or torch._C._is_tracing():
        raise ValueError("a patched network cannot be exported or traced; call remove_patch first")
