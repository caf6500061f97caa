"""The state of one call of a network, which the hooks inside the network find, whichever thread they run in."""

import threading
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from atc_diffusion.adapters import MergedCall
from atc_diffusion.adapters.obstacles import Limit
from atc_diffusion.forecast import Visit
from atc_diffusion.report import RunLog
from atc_diffusion.schedule import Clusters


@dataclass
class Call:
    """One call of a network.

    Attributes:
        owner: the patch of the network.
        kept: how many queries and how many keys are kept, by level.
        fewest: the fewest that its clusters will be asked for, by level.
        timestep: scalar tensor.
        log: of the run that the call is part of.
        size: height and width of the latents.
        after: how many tokens follow the image's in the sequences of its attentions.
        limits: why layers merge less than configured, by layer.
        items: how many images attend to themselves: the batch, times its frames.
        step: which step of its run it is, from 0.
        clusters: those that it reuses; missing ones are added.
        outer: the call of another network within which this network was called.
        visits: how often each layer's attention has been called so far.
        hidden_states: the input of each layer's block.
        merges: what was merged, by layer.
        clustered: the layers that were clustered in this call.
        visit: its forecast.
        running: whether the network has not returned yet.
    """

    owner: object
    kept: dict[int, tuple[int, int]]
    fewest: dict[int, int]
    timestep: Tensor
    log: RunLog
    size: tuple[int, int]
    after: int
    items: int
    step: int
    clusters: Clusters
    outer: "Call | None" = None
    visits: dict[str, int] = field(default_factory=dict)
    hidden_states: dict[str, Tensor] = field(default_factory=dict)
    merges: dict[str, MergedCall] = field(default_factory=dict)
    clustered: dict[str, bool] = field(default_factory=dict)
    limits: dict[str, Limit] = field(default_factory=dict)
    visit: Visit = field(default_factory=Visit)
    running: bool = True


class _Present(threading.local):
    """The call that a thread is in. PyTorch traces this in all versions; a `ContextVar` only in the newest."""

    def __init__(self) -> None:
        self.call: Call | None = None


present = _Present()

# By the input of a block: a gradient checkpoint keeps that, and recomputes the block when its call is long over.
_checkpointed = WeakTensorKeyDictionary()


def enter_block(layer: str, hidden_states: Tensor) -> Call | None:
    """The call that a layer's block is in, or was in if a checkpoint recomputes it; None outside of any."""
    call = present.call
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return call
    if call is not None:
        _checkpointed[hidden_states] = call, call.visits.get(layer, 0)
    elif hidden_states in _checkpointed:
        call, visits = _checkpointed[hidden_states]
        call.visits[layer] = visits
        present.call = call
    return call


def leave_block() -> None:
    """End what `enter_block` recalled; also where a checkpoint stops a block half-way by an exception."""
    call = present.call
    if call is not None and not call.running:
        present.call = None
