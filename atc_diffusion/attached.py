"""Which patch a network has: patches replace each other, and `with patched(...)` blocks give back what was there."""

import asyncio
import sys
import threading
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from atc_diffusion.calls.stack import called_elsewhere
from atc_diffusion.config import Configuration
from atc_diffusion.report import ForecastSummary, LayerSummary, RecordedMerge

_PATCH = "_atc_diffusion"  # the attribute of a patched network


class Patch(Protocol):
    """Merging in one network; prints as what it does there."""

    @property
    def config(self) -> Configuration: ...

    def attach(self) -> None: ...

    def detach(self) -> None: ...

    def summaries(self) -> list[LayerSummary]: ...

    def forecasts(self) -> ForecastSummary | None: ...

    def merges(self) -> list[RecordedMerge]: ...


Owner = threading.Thread | asyncio.Task[Any]


@dataclass(eq=False)
class Block:
    """A `with patched(...)` that has not ended.

    Attributes:
        owner: the asyncio task that entered it or, outside of any, the thread.
        before: the networks that it patches, and what each gets back.
    """

    owner: Owner
    before: dict[nn.Module, Patch | None]


_blocks: list[Block] = []  # in the order in which they were entered
# Other threads get the lock while one waits for their calls: a call may collect a generator that leaves its block.
_lock = threading.Condition(threading.RLock())
_PAUSE = 1e-3  # seconds


def patch_of(network: nn.Module) -> Patch | None:
    patch: Patch | None = getattr(network, _PATCH, None)
    return patch


def replace_patches(patches: Mapping[nn.Module, Patch | None]) -> None:
    """Give every network that patch, or none."""
    with _lock:
        while True:
            if block := _foreign_block(patches):
                raise ValueError(_conflict(block, patches))
            if _exchange(patches):
                return
            _lock.wait(_PAUSE)


def enter(patches: Mapping[nn.Module, Patch | None]) -> Block:
    """Give every network that patch, or none, until `leave`.

    Threads or tasks with equal configurations share one patch; others are refused, because all would draw with the
    last one.
    """
    with _lock:
        while True:
            before = {network: patch_of(network) for network in patches}
            block = _foreign_block(patches)
            if block is not None or _exchange(patches):
                break
            _lock.wait(_PAUSE)
        if block is not None and any(_config(before[network]) != _config(patch) for network, patch in patches.items()):
            raise ValueError(_conflict(block, patches))
        _blocks.append(Block(_owner(), before))
        return _blocks[-1]


def leave(block: Block) -> None:
    """Give back what was there; where a later block is still open, that one will."""
    with _lock:
        try:
            while not _exchange({each: patch for each, patch in block.before.items() if each not in _heirs(block)}):
                _lock.wait(_PAUSE)
            for network, heir in _heirs(block).items():
                heir.before[network] = block.before[network]
        finally:  # also when Ctrl-C ends the waiting: the patch stays then, but the block is over
            _blocks.remove(block)


def _heirs(block: Block) -> dict[nn.Module, Block]:
    """For each network of a block on which a later one is still open, the first of these."""
    later = _blocks[_blocks.index(block) + 1 :]
    return {network: each for each in reversed(later) for network in each.before.keys() & block.before.keys()}


def _owner() -> Owner:
    try:
        return asyncio.current_task() or threading.current_thread()
    except RuntimeError:  # no event loop runs in this thread
        return threading.current_thread()


def _is_active(owner: Owner) -> bool:
    return not owner.done() if isinstance(owner, asyncio.Task) else owner.is_alive()


def _foreign_block(networks: Collection[nn.Module]) -> Block | None:
    """A block on one of the networks that another thread or task is in."""
    for block in _blocks:
        if block.owner is not _owner() and _is_active(block.owner) and not block.before.keys().isdisjoint(networks):
            return block
    return None


def _conflict(block: Block, networks: Collection[nn.Module]) -> str:
    kind = next(type(network).__name__ for network in networks if network in block.before)
    return (
        f"{_name(block.owner)} is inside `with patched(...)` on this {kind}, and a patch is seen by all; wait until"
        " that block ends, use `patched` with an equal configuration, or patch a copy of the model"
    )


def _name(owner: Owner) -> str:
    return f"task {owner.get_name()!r}" if isinstance(owner, asyncio.Task) else f"thread {owner.name!r}"


def _config(patch: Patch | None) -> Configuration | None:
    return None if patch is None else patch.config


def _exchange(patches: Mapping[nn.Module, Patch | None]) -> bool:
    """Exchange patches unless another thread is in a call, which counts on its hooks; returns whether that was done."""
    changed = {network: patch for network, patch in patches.items() if patch_of(network) is not patch}
    if any(network in changed for network in called_elsewhere()):
        return False
    for network in changed:
        if present := patch_of(network):
            present.detach()
            delattr(network, _PATCH)
    for network, patch in changed.items():
        if patch is not None:
            patch.attach()
            setattr(network, _PATCH, patch)
    # torch.compile does not guard on forward hooks: without this, a compiled network would not notice them.
    if changed and "torch._dynamo" in sys.modules:  # or else nothing is compiled, and `reset` would load the compiler
        torch.compiler.reset()
    return True
