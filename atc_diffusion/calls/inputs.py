"""The arguments of a network's call, how far they have moved since an earlier call, and which items are equal."""

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from atc_diffusion.calls.position import is_transformed

Setting = bool | int | float | str | None
JUMP = 4.0  # times as far as in the step before, a number that tells the time does not move


@dataclass(frozen=True)
class Inputs:
    """The arguments of one call, other than the timestep.

    Attributes:
        moving: tensors that change from step to step, each `[B, C, ...]`; the latents come first.
        fixed: tensors that are the same in all steps of an image, such as the text.
        settings: all other arguments that can be compared.
        state: of the network, as `calls.state.fingerprint` has it.
        inference_mode: whether the call was made under `torch.inference_mode`.
    """

    moving: tuple[Tensor, ...]
    fixed: tuple[Tensor, ...] = ()
    settings: tuple[object, ...] = ()
    state: Hashable = None
    inference_mode: bool = field(default_factory=torch.is_inference_mode_enabled)

    @classmethod
    def of(
        cls, latents: Tensor, residuals: Iterable[Any], others: Mapping[str, Any], state: Hashable = None
    ) -> "Inputs":
        """The latents, what a ControlNet adds, and the other arguments of a network besides the timestep, by name."""
        # Of a ControlNet's residuals, the coarsest is enough: it depends on all that the ControlNet was given.
        coarsest = [leaves[-1] for each in residuals if (leaves := list(_leaves(each)))]
        added = [x for x in coarsest if type(x) is Tensor]
        leaves = [leaf.item() if isinstance(leaf, np.generic) else leaf for leaf in _leaves(dict(others))]
        moving = [latents, *(x for x in added if x.ndim > 2)]
        fixed = [leaf for leaf in leaves if isinstance(leaf, Tensor)] + [x for x in added if x.ndim <= 2]
        settings = (len(coarsest), *(leaf for leaf in leaves if isinstance(leaf, Setting)))
        return cls(tuple(x.detach() for x in moving), tuple(x.detach() for x in fixed), settings, state)

    def clone(self) -> "Inputs":
        """A copy that survives changes in place."""
        moving, fixed = (tuple(x.detach().clone() for x in tensors) for tensors in (self.moving, self.fixed))
        return replace(self, moving=moving, fixed=fixed)

    @property
    def latents(self) -> Tensor:
        return self.moving[0]

    @property
    def num_bytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in (*self.moving, *self.fixed))

    @property
    def kind(self) -> object:
        """Only inputs of one kind are compared."""
        tensors = tuple((x.shape, x.dtype, x.device) for x in (*self.moving, *self.fixed))
        return len(self.moving), tensors, self.settings, self.state, self.inference_mode

    @property
    def readable(self) -> bool:
        """Whether values can be read now: not of tensors without data or under a transform, nor in a CUDA graph."""
        tensors = (*self.moving, *self.fixed)
        if any(type(x) not in (Tensor, torch.nn.Parameter) or x.is_meta or is_transformed(x) for x in tensors):
            return False
        return not (self.latents.is_cuda and torch.cuda.is_current_stream_capturing())

    def same_latents(self, other: "Inputs") -> bool:
        """Whether the latents are equal, and the network is in the same state."""
        same_state = (self.state, self.inference_mode) == (other.state, other.inference_mode)
        return same_state and _equal(self.latents, other.latents)

    def same_conditions(self, other: "Inputs") -> bool:
        """Whether everything that stays the same throughout an image is equal."""
        if (self.settings, self.state) != (other.settings, other.state):
            return False
        return len(self.fixed) == len(other.fixed) and all(map(_equal, self.fixed, other.fixed))


class Clock:
    """Tells the numbers among the settings that merely tell the time: those that have moved on at every step so far.

    An application's progress is one. Such a number counts as a condition until it has moved twice in a row, and again
    from the first step at which it stands still, turns back or jumps.
    """

    def __init__(self) -> None:
        self._step = -1
        self._settings: tuple[object, ...] = ()
        self._changes: tuple[int, ...] = ()
        self._moves: tuple[float, ...] = ()

    def without_time(self, inputs: Inputs, step: int) -> Inputs:
        """The inputs of a call at a step, with one and the same word for every number that tells the time."""
        if step > self._step:
            self._advance(inputs.settings, step)
        if len(inputs.settings) != len(self._changes) or max(self._changes, default=0) < 2:
            return inputs
        pairs = zip(inputs.settings, self._changes, strict=True)
        return replace(inputs, settings=tuple("time" if changes > 1 else value for value, changes in pairs))

    def _advance(self, settings: tuple[object, ...], step: int) -> None:
        old = self._settings if len(self._settings) == len(settings) else settings
        if len(self._changes) != len(settings):
            self._changes, self._moves = (0,) * len(settings), (0.0,) * len(settings)
        moves = tuple(map(_move, old, settings))
        self._changes = tuple(
            count + 1 if move and (not before or 0 < move / before < JUMP) else int(move != 0)
            for count, before, move in zip(self._changes, self._moves, moves, strict=True)
        )
        self._moves, self._settings, self._step = moves, settings, step


def _move(old: object, new: object) -> float:
    """From one number to another; 0 for anything else."""
    numbers = type(new) in (int, float) and type(old) in (int, float)
    return new - old if numbers else 0.0  # type: ignore[operator]


def changes(inputs: Inputs, earlier: Sequence[Inputs]) -> list[float]:
    """How far `inputs` are from each of the `earlier` ones of their kind; one read of the device.

    That is the relative change in norm of the item and tensor that moved most, where channels that did not move are
    left out, such as a mask beside the latents; infinite where anything fixed differs.
    """
    moved = torch.stack([_relative_changes(x, torch.stack(old)) for x, *old in _columns(inputs, earlier, "moving")])
    same = [(x == torch.stack(old)).reshape(len(old), -1).all(dim=1) for x, *old in _columns(inputs, earlier, "fixed")]
    largest = moved.amax(dim=0)
    return (torch.where(torch.stack(same).all(dim=0), largest, torch.inf) if same else largest).tolist()


def _columns(inputs: Inputs, earlier: Sequence[Inputs], name: str) -> Any:
    """Each tensor of `inputs`, followed by its counterparts in `earlier`."""
    return zip(*(getattr(each, name) for each in (inputs, *earlier)), strict=True)


def _relative_changes(x: Tensor, earlier: Tensor) -> Tensor:
    """`[K]` of `x` `[B, C, ...]` and `earlier` `[K, B, C, ...]`: the largest relative change of an item."""
    x, earlier = x.float().flatten(2), earlier.float().flatten(3)
    moved, size = (x - earlier).square().sum(dim=-1), earlier.square().sum(dim=-1)
    change = moved.sum(dim=-1) / (size * (moved > 0)).sum(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
    return change.amax(dim=1).sqrt()


def equal_items(latents: Tensor) -> list[list[bool]]:
    """For each item of a batch, which items are equal to it."""
    equal: list[list[bool]] = torch.stack([(latents == item).flatten(1).all(dim=1) for item in latents]).tolist()
    return equal


def _equal(x: Tensor, y: Tensor) -> bool:
    return x.shape == y.shape and x.dtype == y.dtype and x.device == y.device and torch.equal(x, y)


def _leaves(value: Any) -> Iterator[Any]:
    """What is in nested mappings, lists and tuples; of mappings the keys too."""
    if isinstance(value, Mapping):
        value = [leaf for item in value.items() for leaf in item]
    if isinstance(value, list | tuple):
        for each in value:
            yield from _leaves(each)
    else:
        yield value
