"""A network's `forward` that can be skipped, and whose interruption is noticed."""

import functools
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import nn

from atc_diffusion.calls.state import is_own_forward


class Watcher(Protocol):
    """What is asked around a network's forward."""

    def skipped(self) -> Any:
        """What the present call returns without running; None: it must run."""

    def forward(self, inner: Any) -> Any:
        """The forward of the network that is called, which is `inner` unless that is a replica."""

    def finished(self, returned: Any) -> Any:
        """What the caller gets of what the network returned."""

    def abandoned(self) -> None:
        """Forget the present call, which was interrupted."""


class WatchedForward:
    """A network's `forward` in the hands of a watcher.

    Forward hooks cannot keep a network from running, and an interruption such as Ctrl-C passes them by. A deep copy of
    the network has its own.
    """

    def __init__(self, network: nn.Module, watcher: Watcher) -> None:
        self._network = network
        self._watcher: Watcher | None = watcher

    def attach(self) -> None:
        self._before = self._network.__dict__.get("forward")
        self._inner = self._network.forward
        self._outer = functools.update_wrapper(functools.partial(self._forward), self._inner)
        self._network.forward = self._outer

    def detach(self) -> None:
        """Restore `forward`, also beneath what others have wrapped around it since, as accelerate does."""
        self._watcher = None  # for those who keep the wrapper
        for name in ("forward", "_old_forward", "_original_forward"):
            if name in self._network.__dict__:
                self._replace_in(self._network.__dict__, name)
        if self._before is None and self._network.__dict__.get("forward") == self._inner:
            del self._network.forward

    def _replace_in(self, attributes: dict[str, Any], name: str) -> None:
        """Put the original in the place of ours in an attribute, or in what that wraps."""
        if attributes[name] is self._outer:
            attributes[name] = self._inner
            return
        for each in _wrapped(attributes[name]):
            if getattr(each, "__wrapped__", None) is self._outer:
                each.__wrapped__ = self._inner

    def mend(self) -> None:
        """Wrap `forward` again if a hook of accelerate has taken ours away with itself."""
        chain = list(_wrapped(self._network.forward))
        if self._outer not in chain and self._ends_in_own(chain):
            self.attach()

    @property
    def is_trusted(self) -> bool:
        """Whether all wrappers of `forward` are declared, as those of offloading are.

        Others, such as a cache that counts steps, may need to see every step.
        """
        chain = list(_wrapped(self._network.forward))
        return self._outer in chain and self._ends_in_own(chain)

    def _ends_in_own(self, chain: list[Any]) -> bool:
        kind = type(self._network)
        return is_own_forward(kind) and any(getattr(each, "__func__", None) is kind.forward for each in chain)

    @torch.compiler.disable(recursive=False)
    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._watcher is None:
            return self._inner(*args, **kwargs)
        try:
            skipped = self._watcher.skipped()
            if skipped is not None:
                return skipped
            return self._watcher.finished(self._watcher.forward(self._inner)(*args, **kwargs))
        except BaseException:
            self._watcher.abandoned()
            raise


def _wrapped(function: Any) -> Iterator[Any]:
    """`function` and what it wraps, from the outside in."""
    while function is not None:
        yield function
        function = getattr(function, "__wrapped__", None)
