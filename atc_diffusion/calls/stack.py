"""Which modules are being called, found on the stacks of threads: interruptions such as Ctrl-C cannot falsify these.

A frame keeps its local variables alive, and so all activations above it. No frame may be kept, least of all in itself.
"""

import sys
import threading
from types import FrameType

from torch import nn


def called(innermost: FrameType | None = None) -> list[nn.Module]:
    """The modules whose calls are on a stack, networks before their parts; of this thread if none is given."""
    modules = []
    frame: FrameType | None = innermost or sys._getframe()
    while frame is not None:
        if frame.f_code is nn.Module._call_impl.__code__:
            modules.append(frame.f_locals["self"])
        frame = frame.f_back
    return modules[::-1]


def called_elsewhere() -> list[nn.Module]:
    """The modules that other threads are calling."""
    stacks = sys._current_frames()
    del stacks[threading.get_ident()]
    return [module for innermost in stacks.values() for module in called(innermost)]


def runs_file(path: str) -> bool:
    """Whether a function of a file is on the stack of this thread."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code.co_filename != path:
        frame = frame.f_back
    return frame is not None
