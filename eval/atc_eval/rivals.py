"""The rivals of merging by clusters, each by its authors' package where there is one.

A rival is a context manager over a pipeline. It yields the callable that draws, with the pipeline's arguments.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any, Literal

import torch
from diffusers import PyramidAttentionBroadcastConfig, UNet2DConditionModel, apply_pyramid_attention_broadcast
from diffusers.hooks import HookRegistry
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, interpolate

from atc_diffusion import ATCConfig, LayerSummary, patched, summary
from atc_eval.skipped_steps import EasyCache, Spectrum

Draw = Callable[..., Any]
Downsample = Callable[[Tensor, tuple[int, int]], Tensor]


def fewer_steps(pipe: Any, fraction: float) -> AbstractContextManager[Draw]:
    """The unmerged model with a fraction of the denoising steps."""
    return nullcontext(partial(_draw_fewer_steps, pipe, fraction))


def _draw_fewer_steps(pipe: Any, fraction: float, *args: Any, num_inference_steps: int, **kwargs: Any) -> Any:
    return pipe(*args, num_inference_steps=max(1, round(fraction * num_inference_steps)), **kwargs)


@contextmanager
def downsampled_keys(pipe: Any, factor: float, downsample: Downsample) -> Iterator[Draw]:
    """Downsample the keys and values of self-attention on their square grid, in the layers that ATC merges by default.

    A cell of `factor` by `factor` tokens becomes one. With nearest neighbours this is ToDo (Smith et al. 2024, arXiv
    2402.13573, section 3.2), which hooks the inputs of `to_k` and `to_v` in the same way
    (github.com/ethansmith2000/ImprovedTokenMerge, merge.py).
    """
    hook = partial(_downsample_input, int(factor), downsample)
    with ExitStack() as hooks:
        for layer in merged_layers(pipe):
            attn = (getattr(pipe, layer.network) if layer.network else pipe).get_submodule(layer.name)
            for projection in (attn.to_k, attn.to_v):
                hooks.enter_context(projection.register_forward_pre_hook(hook))
        yield pipe


def merged_layers(model: Any, levels: Literal["finest", "all"] = "finest") -> tuple[LayerSummary, ...]:
    """The layers that `ATCConfig(levels=levels)` merges, in a pipeline or a network."""
    with patched(model, ATCConfig(r=1.0, r_keys=0.5, levels=levels)):
        return summary(model).layers


def _downsample_input(factor: int, downsample: Downsample, module: torch.nn.Module, args: tuple[Tensor]) -> Tensor:
    """Tokens `[B, N, C]` of a square grid as `[B, N / factor^2, C]`."""
    side = round(args[0].shape[1] ** 0.5)
    grid = args[0].transpose(1, 2).unflatten(2, (side, side))
    return downsample(grid, (side // factor, side // factor)).flatten(2).transpose(1, 2)


@contextmanager
def tomesd(pipe: Any, keep: float) -> Iterator[Draw]:
    """Token merging by its authors' package, which keeps `keep` percent of the tokens at the finest level."""
    import tomesd

    finest = min(layer.level for layer in merged_layers(pipe))  # by default it does nothing where that is not 1
    with torch.random.fork_rng():  # it draws tokens from the global random state
        torch.manual_seed(0)
        tomesd.apply_patch(pipe, ratio=1 - keep / 100, max_downsample=finest)
        try:
            yield pipe
        finally:
            tomesd.remove_patch(pipe)


@contextmanager
def deepcache(pipe: Any, interval: float) -> Iterator[Draw]:
    """DeepCache (Ma et al. 2024) by its authors' package: the deep part of the UNet runs every `interval` steps."""
    from DeepCache import DeepCacheSDHelper

    helper = DeepCacheSDHelper(pipe=pipe)
    helper.set_params(cache_interval=int(interval), cache_branch_id=0)
    helper.enable()
    try:
        yield pipe
    finally:
        helper.disable()


@contextmanager
def pyramid_attention_broadcast(pipe: Any, interval: float) -> Iterator[Draw]:
    """PAB (Zhao et al. 2024) by diffusers: each attention's output serves `interval` steps in the middle of a run."""
    timesteps: list[int] = []  # of the calls so far
    network = pipe.unet
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=int(interval),
        cross_attention_block_skip_range=int(interval),
        current_timestep_callback=lambda: timesteps[-1],
    )
    before = {module: set(vars(module)) for module in network.modules()}
    apply_pyramid_attention_broadcast(network, config)
    hook = network.register_forward_pre_hook(lambda unet, args: timesteps.append(int(args[1])))
    registry = HookRegistry.check_if_exists_or_initialize(network)
    try:
        yield partial(_draw_with_pab, pipe, registry)
    finally:
        hook.remove()
        registry.remove_hook("pyramid_attention_broadcast")
        for module in network.modules():  # diffusers leaves an empty registry, and the forward as an attribute
            for name in {"_diffusers_hook", "forward"} - before[module]:
                vars(module).pop(name, None)


def _draw_with_pab(pipe: Any, registry: HookRegistry, *args: Any, **kwargs: Any) -> Any:
    registry.reset_stateful_hooks()
    return pipe(*args, **kwargs)


@dataclass(frozen=True)
class _Kind:
    label: str
    setting: Callable[[float], str]  # a strength in words
    apply: Callable[[Any, float], AbstractContextManager[Draw]]
    strengths: tuple[float, float]  # the least and the most
    package: str = "diffusers"
    whole: bool = True  # whether the strength is a whole number
    needs_unet: bool = False


def _keys_kept(factor: float) -> str:
    return f"keys {100 / factor**2:.3g} %"


KINDS = {
    "steps": _Kind("fewer steps", "{:.4g} of the steps".format, fewer_steps, (0.01, 0.99), whole=False),
    "todo": _Kind("ToDo", _keys_kept, partial(downsampled_keys, downsample=interpolate), (2, 64)),
    "pooled": _Kind("pooled keys", _keys_kept, partial(downsampled_keys, downsample=adaptive_avg_pool2d), (2, 64)),
    "tomesd": _Kind("tomesd", "{:g} %".format, tomesd, (25, 99), "tomesd", whole=False, needs_unet=True),
    "deepcache": _Kind("DeepCache", "every {:g} steps".format, deepcache, (2, 1000), "DeepCache", needs_unet=True),
    "spectrum": _Kind("Spectrum", "window + {:g}".format, Spectrum.applied, (0, 10), whole=False, needs_unet=True),
    "easycache": _Kind(
        "EasyCache", "threshold {:g}".format, EasyCache.applied, (0.001, 10), whole=False, needs_unet=True
    ),
    "pab": _Kind("PAB", "every {:g} steps".format, pyramid_attention_broadcast, (2, 1000), needs_unet=True),
}


@dataclass(frozen=True)
class Rival:
    """One rival at one strength."""

    name: str  # a key of `KINDS`
    strength: float  # in the unit that `--rival` explains

    def __post_init__(self) -> None:
        if self.name not in KINDS:
            raise ValueError(f"a rival is one of {', '.join(KINDS)}, got {self.name!r}")
        least, most = self.kind.strengths
        if not least <= self.strength <= most or (self.kind.whole and self.strength != int(self.strength)):
            kind = "a whole number" if self.kind.whole else "a number"
            raise ValueError(f"{self.name} takes {kind} from {least:g} to {most:g}, got {self.strength:g}")
        if find_spec(self.kind.package) is None:
            raise ValueError(f"{self.name} needs a package: pip install {self.kind.package}")

    @classmethod
    def parse(cls, text: str) -> "Rival":
        """The rival that `text` names, such as "steps:0.7"."""
        name, _, strength = text.partition(":")
        try:
            number = float(strength)
        except ValueError:
            raise ValueError(f"a rival is written with its strength, such as steps:0.7, got {text!r}") from None
        return cls(name, number)

    @property
    def kind(self) -> _Kind:
        return KINDS[self.name]

    def applied(self, pipe: Any) -> AbstractContextManager[Draw]:
        """Apply the rival to `pipe` within a `with` block; yields the callable that draws."""
        if self.kind.needs_unet and not hasattr(pipe, "unet") and not isinstance(pipe, UNet2DConditionModel):
            raise ValueError(f"{self.name} needs a UNet, and {type(pipe).__name__} has none; leave it out")
        return self.kind.apply(pipe, self.strength)
