"""Which modules are being called, found on the stacks of threads: interruptions such as Ctrl-C cannot falsify these."""

import sys
import threading
from collections.abc import Iterator
from types import FrameType

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
