"""Which modules are being called, found on the stacks of threads: interruptions such as Ctrl-C cannot falsify these.

Also whether a call is a tracer's: a patched network cannot be traced, as its values decide which tokens are merged.

A frame keeps its local variables alive, and so all activations above it. No frame may be kept, least of all in itself.
"""

import sys
import threading
from collections.abc import Iterator
from types import FrameType

import torch
from torch import nn


def _frames(innermost: FrameType | None = None) -> Iterator[FrameType]:
    """The frames of a stack, from the innermost one; of this thread if none is given. They must not be kept."""
    frame: FrameType | None = innermost or sys._getframe()
    while frame is not None:
        yield frame
        frame = frame.f_back


def called(innermost: FrameType | None = None) -> list[nn.Module]:
    """The modules whose calls are on a stack, networks before their parts; of this thread if none is given."""
    calls = nn.Module._call_impl.__code__
    return [frame.f_locals["self"] for frame in _frames(innermost) if frame.f_code is calls][::-1]


def called_elsewhere() -> list[nn.Module]:
    """The modules that other threads are calling."""
    stacks = sys._current_frames()
    del stacks[threading.get_ident()]
    return [module for innermost in stacks.values() for module in called(innermost)]


def runs_file(path: str) -> bool:
    """Whether a function of a file is on the stack of this thread."""
    return any(frame.f_code.co_filename == path for frame in _frames())


def refuse_tracing() -> None:
    """Raise ValueError under `torch.export`, ONNX export, `torch.jit.trace` or `make_fx`; `torch.compile` is fine."""
    if torch.compiler.is_dynamo_compiling():
        return
    proxies = sys.modules.get("torch.fx.experimental.proxy_tensor")  # or nothing is traced by it; to load it takes long
    is_traced_by_fx = proxies is not None and proxies.get_proxy_mode() is not None
    if torch.compiler.is_compiling() or torch._C._is_tracing() or is_traced_by_fx:
        raise ValueError("a patched network cannot be exported or traced; call remove_patch first")
