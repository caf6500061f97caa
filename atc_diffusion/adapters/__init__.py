"""What an adapter of a model family provides: its self-attentions, and how tokens go in and out of them."""

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from atc_diffusion.adapters.layer import Cut, Demands, ImageSlice, Layer, MergedCall
from atc_diffusion.adapters.noise import NoiseSchedule, diffusion
from atc_diffusion.adapters.obstacles import Limit, limit_by_hooks, replaced_code

# Arguments by which networks take what a ControlNet, a T2I-Adapter, BrushNet or PowerPaint adds to their features.
_RESIDUALS = re.compile(
    r"residual|controlnet_(block|single_block)_samples|block_controlnet_hidden_states|block_add_samples?$"
)

Args = tuple[Any, ...]
Kwargs = dict[str, Any]


@dataclass(frozen=True)
class ImageInput:
    """The image in a call of a network.

    Attributes:
        latents: `[B, C, ...]`, or their tokens `[B, C, N]`.
        size: height and width of the latents.
        timestep: on a scale from 1000 (noise) to 0.
        others: all other arguments of the call.
        after: how many tokens follow the image's in the sequences of its attentions.
        residuals: what a ControlNet or the like adds, one group of tensors for each argument.
    """

    latents: Tensor
    size: tuple[int, int]
    timestep: Any
    others: Kwargs
    after: int = 0
    residuals: tuple[Any, ...] = ()

    @property
    def items(self) -> int:
        """How many images attend to themselves: the batch, times its frames."""
        return len(self.latents) * (self.latents.shape[2] if self.latents.ndim == 5 else 1)

    @classmethod
    def of(cls, latents: Tensor, size: tuple[int, int], timestep: Any, others: Kwargs, after: int = 0) -> "ImageInput":
        """With the residuals among the other arguments told apart, by their names."""
        residuals = {name: value for name, value in others.items() if value is not None and _RESIDUALS.search(name)}
        others = {name: value for name, value in others.items() if name not in residuals}
        return cls(latents, size, timestep, others, after, tuple(residuals.values()))


def _of_original(name: str) -> Any:
    """An attribute that is the original's, also when it is set."""
    return property(lambda self: getattr(self.original, name), lambda self, value: setattr(self.original, name, value))


class StandIn:
    """A processor with one of diffusers' inside, which is put back when the patch is removed.

    It says that it is of the original's class, because diffusers looks processors up by `__class__`: guidance by hooks
    in a registry, others by `isinstance`.
    """

    def __init__(self, original: Any) -> None:
        self.original = original

    @property  # type: ignore[misc]  # read-only, as nobody sets it
    def __class__(self) -> Any:
        return type(self.original)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.original,)  # copying and pickling go by `__class__`

    _attention_backend = _of_original("_attention_backend")  # what set_attention_backend and
    _parallel_config = _of_original("_parallel_config")  # enable_parallelism set


class Family(ABC):
    """The adapter of one model family.

    Attributes:
        projects_all: whether all tokens are projected, and keys and values merge after that.
    """

    projects_all = False

    @abstractmethod
    def layers(self, network: nn.Module) -> list[Layer]:
        """The self-attentions of `network`; empty if it belongs to another family."""

    def image(self, given: Kwargs) -> ImageInput:
        """The image in a call of a network, from the arguments of its forward method."""
        timestep, latents = argument(given, "timestep"), argument(given, "sample", "hidden_states")
        others = without(given, "timestep", "sample", "hidden_states")
        # A ControlNet that is given tokens is also given its condition, which has the size of the latents.
        height, width = (given.get("controlnet_cond", latents) if latents.ndim == 3 else latents).shape[-2:]
        return ImageInput.of(latents, (height, width), timestep, others)

    def noise(self, scheduler: Any) -> NoiseSchedule:
        """How noisy latents are at a timestep, by the pipeline's scheduler if it is known."""
        return diffusion(scheduler)

    def output(self, returned: Any, latents: Tensor) -> Tensor:
        """The output among what a network returned: like its latents `[B, C, ...]`, perhaps with more channels."""
        return returned[0]

    def returned(self, template: Any, output: Tensor) -> Any:
        """An output `[B, C, ...]` in the form and dtype of what the network returned earlier, `template`.

        Channels that it lacks, such as variances, stay as they were then.
        """
        before = template[0]
        return like(template, torch.cat([output.to(before.dtype), before[:, output.shape[1] :]], dim=1))

    def stand_ins(self, wider_heads: bool) -> Mapping[type, type[StandIn]]:
        """Which processor takes the place of which of diffusers', where hooks are not enough."""
        return {}

    def attach(self, attention: Any, wider_heads: bool) -> None:
        """Put a stand-in in the place of the attention's processor if merging needs one, unless it is there."""
        stand_in = self.stand_ins(wider_heads).get(type(attention.processor))
        if stand_in is not None:
            attention.processor = stand_in(attention.processor)

    def detach(self, attention: Any) -> None:
        """Undo `attach` exactly."""
        if isinstance(attention.processor, StandIn):
            attention.processor = attention.processor.original

    def obstacle(self, layer: Layer, demands: Demands) -> str | None:
        """What keeps a layer from merging as demanded, and the way out, as in "has ..."; None: nothing does."""
        return replaced_code(layer.attention)

    def limit(self, layer: Layer, demands: Demands) -> Limit | None:
        """Why a layer merges less than demanded in a call, such as by hooks that come and go; None: it does not."""
        obstacle = self.obstacle(layer, demands)
        return Limit(obstacle) if obstacle else limit_by_hooks(layer.attention)

    def tokens(self, args: Args, kwargs: Kwargs, image: ImageSlice) -> Tensor:
        """The image's tokens `[B, N, C]` among the arguments of an attention."""
        return first(args, kwargs)

    @abstractmethod
    def merge(self, attention: Any, args: Args, kwargs: Kwargs, image: ImageSlice, cut: Cut) -> tuple[Args, Kwargs]:
        """The arguments of the attention with its tokens merged and, if asked for, weighted in the softmax.

        Args:
            attention: the module that is called.
            args: what it is called with.
            kwargs: what it is called with.
            image: where the image's tokens are.
            cut: tells how they merge, from a projection of them; to be called once, at the latest within the attention.
        """

    @abstractmethod
    def unmerge(self, output: Any, merge: MergedCall) -> Any:
        """The attention's output, with the output of every cluster copied to its members."""


def argument(given: Kwargs, *names: str) -> Any:
    """The argument of a network's call that has one of these names; a TypeError if none was given, as by `forward`."""
    for name in names:
        if name in given:
            return given[name]
    raise TypeError(f"the network was called without its argument {' or '.join(map(repr, names))}")


def without(given: Kwargs, *names: str) -> Kwargs:
    """The other arguments of a network's call."""
    return {name: value for name, value in given.items() if name not in names}


def like(template: Any, output: Any) -> Any:
    """An output in a tuple or a diffusers `BaseOutput`, as `template` is."""
    return (output,) if isinstance(template, tuple) else type(template)(**dict.fromkeys(template, output))


def first(args: Args, kwargs: Kwargs) -> Tensor:
    """The first argument of a block or an attention: its tokens `[B, N, C]`."""
    return args[0] if args else kwargs["hidden_states"]
