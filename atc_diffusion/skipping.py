"""A network's `forward` that can be skipped."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn


class SkippingForward:
    """A network's `forward` that returns the forecast of the present call, if there is one.

    Forward hooks cannot keep a network from running. A deep copy of the network has its own.

    Args:
        network: to be wrapped.
        forecast: of the present call; None: the network must run.
    """

    def __init__(self, network: nn.Module, forecast: Callable[[], Any]) -> None:
        self._network = network
        self._forecast = forecast

    def attach(self) -> None:
        self._before = self._network.__dict__.get("forward")
        self._inner = self._network.forward
        self._outer = functools.update_wrapper(functools.partial(self._forward), self._inner)
        self._network.forward = self._outer

    def detach(self) -> None:
        """Restore `forward`, also beneath a hook of accelerate that has come since."""
        for name in ("forward", "_old_forward"):
            if self._network.__dict__.get(name) is self._outer:
                setattr(self._network, name, self._inner)
        if self._before is None and self._network.__dict__.get("forward") is self._inner:
            del self._network.forward

    @property
    def trusted(self) -> bool:
        """Whether all wrappers of `forward` are declared, as those of offloading are.

        Others, such as a cache that counts steps, may need to see every step.
        """
        chain = list(_wrapped(self._network.forward))
        end = type(self._network).forward
        return self._outer in chain and any(getattr(each, "__func__", None) is end for each in chain)

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self._forecast()
        return self._inner(*args, **kwargs) if output is None else output


def _wrapped(function: Any) -> Iterator[Any]:
    """`function` and what it wraps, from the outside in."""
    while function is not None:
        yield function
        function = getattr(function, "__wrapped__", None)
