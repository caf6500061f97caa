"""Which modules are being called, found on the stacks of threads, which interruptions such as Ctrl-C cannot falsify.

And whether the call is a tracer's: a patched network cannot be traced, as its values decide which tokens are merged.
"""

import sys
import threading
from collections.abc import Iterator
from types import FrameType

import torch
from torch import nn


def frames(innermost: FrameType | None = None) -> Iterator[FrameType]:
    """The frames of a stack, from the innermost one; of this thread if none is given."""
    frame: FrameType | None = innermost or sys._getframe()
    while frame is not None:
        yield frame
        frame = frame.f_back


def called(innermost: FrameType | None = None) -> Iterator[nn.Module]:
    """The modules whose calls are on a stack, networks before their parts; of this thread if none is given."""
    for frame in reversed(list(frames(innermost))):
        if frame.f_code is nn.Module._call_impl.__code__:
            yield frame.f_locals["self"]


def called_elsewhere() -> Iterator[nn.Module]:
    """The modules that other threads are calling."""
    for thread, innermost in sys._current_frames().items():
        if thread != threading.get_ident():
            yield from called(innermost)


def refuse_tracing() -> None:
    """Raise ValueError under `torch.export`, ONNX export, `torch.jit.trace` or `make_fx`; `torch.compile` is fine."""
    if torch.compiler.is_dynamo_compiling():
        return
    proxies = sys.modules.get("torch.fx.experimental.proxy_tensor")  # or nothing is traced by it; to load it takes long
    is_traced_by_fx = proxies is not None and proxies.get_proxy_mode() is not None
    if torch.compiler.is_compiling() or torch._C._is_tracing() or is_traced_by_fx:
        raise ValueError("a patched network cannot be exported or traced; call remove_patch first")
