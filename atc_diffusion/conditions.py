"""What a network was called with besides latents and timestep: the same in all steps of a picture."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from atc_diffusion.inputs import RESIDUALS, leaves


@dataclass(frozen=True)
class Conditions:
    """Arguments of a call; those that a ControlNet makes from the latents are left out.

    Attributes:
        tensors: such as the text's embedding.
        settings: all others that can be compared, such as a scale.
    """

    tensors: tuple[Tensor, ...] = ()
    settings: tuple[object, ...] = ()

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> "Conditions":
        found = [leaf for name, value in arguments.items() if not RESIDUALS.search(name) for leaf in leaves(value)]
        tensors = tuple(leaf for leaf in found if isinstance(leaf, Tensor))
        return cls(tensors, tuple(leaf for leaf in found if isinstance(leaf, bool | int | float | str | None)))

    def clone(self) -> "Conditions":
        """A copy that survives changes in place."""
        return replace(self, tensors=tuple(x.detach().clone() for x in self.tensors))

    def same(self, other: "Conditions") -> bool:
        """Whether all of `other` is equal to this."""
        if len(self.tensors) != len(other.tensors) or self.settings != other.settings:
            return False
        return all(map(_equal, self.tensors, other.tensors))


def _equal(x: Tensor, y: Tensor) -> bool:
    return x.shape == y.shape and x.dtype == y.dtype and x.device == y.device and torch.equal(x, y)
