"""The state of one call of a network, which the hooks inside the network find, whichever thread they run in."""

import threading
import weakref
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from atc_diffusion.adapters.layer import MergedCall
from atc_diffusion.adapters.obstacles import Limit
from atc_diffusion.calls.stack import called
from atc_diffusion.forecasting import Decision
from atc_diffusion.merging.reuse import CachedClusters
from atc_diffusion.report import RunLog

Part = Literal["block", "attention"]


@dataclass
class Call:
    """One call of a network.

    Attributes:
        owner: the patch of the network.
        network: the network, or a replica of it.
        kept: how many queries and how many keys are kept, by level.
        fewest: the fewest that its clusters will be asked for, by level.
        timestep: scalar tensor.
        log: of the run that the call is part of.
        size: height and width of the latents.
        after: how many tokens follow the image's in the sequences of its attentions.
        items: how many images attend to themselves: the batch, times its frames.
        step: which step of its run it is, from 0.
        clusters: those that it reuses; missing ones are added.
        limits: the layers that merge less than was asked for, and why.
        outer: the call of another network within which this network was called.
        decision: whether it runs, and what its caller gets.
        times_called: how often each layer's attention has been called so far.
        hidden_states: the input of each layer's block, or a weak reference: checkpoints find the call by that input.
        merges: what was merged, by layer.
        clustered: the layers that were clustered in this call.
        entered: whether the network's forward has been called.
        running: whether the network has not returned yet.
        is_repeated: whether a gradient checkpoint makes it again.
    """

    owner: object
    network: nn.Module
    kept: dict[int, tuple[int, int]]
    fewest: dict[int, int]
    timestep: Tensor
    log: RunLog
    size: tuple[int, int]
    after: int
    items: int
    step: int
    clusters: CachedClusters
    limits: dict[str, Limit]
    outer: "Call | None" = None
    decision: Decision = field(default_factory=Decision)
    times_called: dict[str, int] = field(default_factory=dict)
    hidden_states: "dict[str, Tensor | weakref.ref[Tensor]]" = field(default_factory=dict)
    merges: dict[str, MergedCall] = field(default_factory=dict)
    clustered: dict[str, bool] = field(default_factory=dict)
    entered: bool = False
    running: bool = True
    is_repeated: bool = False

    def see(self, layer: str, hidden_states: Tensor) -> None:
        self.hidden_states[layer] = hidden_states if torch.compiler.is_compiling() else weakref.ref(hidden_states)

    def seen(self, layer: str) -> Tensor | None:
        """The input of a layer's block, while it is in that."""
        hidden_states = self.hidden_states.get(layer)
        return hidden_states() if isinstance(hidden_states, weakref.ref) else hidden_states

    def repeated(self, network: nn.Module, outer: "Call | None") -> "Call":
        """The same call made again, of which nothing is done yet."""
        return Call(
            self.owner, network, self.kept, self.fewest, self.timestep, self.log, self.size, self.after, self.items,
            self.step, self.clusters, self.limits, outer, is_repeated=True,
        )  # fmt: skip


class _Present(threading.local):
    """The call that a thread is in. PyTorch traces this in all versions; a `ContextVar` only in the newest."""

    recalled_by: Part | None = None

    def __init__(self) -> None:
        self._call: weakref.ref[Call] | None = None

    @property
    def call(self) -> Call | None:
        return None if self._call is None else self._call()

    @call.setter
    def call(self, call: Call | None) -> None:
        self._call = None if call is None else weakref.ref(call)


present = _Present()


def present_call(owner: object) -> Call | None:
    """The call of this owner that a thread is in, or that a checkpoint recomputes; None outside of any.

    An interruption such as Ctrl-C passes hooks by, and leaves its call behind.
    """
    call = present.call
    if call is None or call.owner is not owner or torch.compiler.is_compiling():
        return call if call is not None and call.owner is owner else None
    return call if not call.running or any(each is call.network for each in called()) else None
