"""Patched networks cannot be traced, because the values of tokens decide which of them merge."""

import torch


def refuse_tracing() -> None:
    """Raise ValueError under `torch.export`, ONNX export or `torch.jit.trace`; `torch.compile` is fine."""
    compiling, exporting = torch.compiler.is_compiling(), torch.compiler.is_exporting()
    if exporting or (not compiling and torch._C._is_tracing()):
        raise ValueError("a patched network cannot be exported or traced; call remove_patch first")
