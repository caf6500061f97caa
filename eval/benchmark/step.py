"""Tables of a network's denoising steps: unpatched, merged by this project, and patched by its peers.

Steps that reuse a clustering are faster than the step that makes it, so the unit of timing is a *period*: the steps of
one long run that a clustering serves, of which the first clusters because its latents are new. A candidate warms up for
one period, and each of its turns continues the run by another.
"""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice
from typing import Any, Literal

import tomesd
import torch
from torch import nn
from torch.nn.functional import interpolate

from atc_diffusion import ATCConfig, LayerSummary, MergeConfig, ToMeConfig, apply_patch, patched, summary
from benchmark.models import BATCH, MODELS, Model, load, make_inputs, repeated
from benchmark.tables import Row, Table, mebibytes
from benchmark.timing import Timing, take_turns, time_alone
from draw.rivals import hook_keys

STEPS_A_CLUSTERING = 3  # about as many as one serves in a run of 20 steps
FREE = "atc-free"  # as atc, with all clustering done in the warm-up
DEEPER = "atc-fast-2"  # as atc-fast, at the two finest levels
OURS: dict[str, Callable[[float], MergeConfig]] = {
    "tome": lambda r: ToMeConfig(r=r),
    "atc-paper": ATCConfig.paper,
    "atc": lambda r: ATCConfig(r=r),
    FREE: lambda r: ATCConfig(r=r, recluster_threshold=math.inf),
    "atc-fast": ATCConfig.fast,
    "atc-fast-wide": lambda r: ATCConfig.fast(r, widen_heads=True),
    DEEPER: ATCConfig.fast,
}
CANDIDATES = ("tomesd", "todo", *OURS)
OF_UNETS = ("tomesd", "todo", DEEPER)
OF_TRANSFORMERS = ("tome",)
OF_ROTARY = ("unpatched", "atc-fast", "atc-fast-wide")
COMPILED = ("unpatched", "atc", "atc-fast")
ALWAYS_KEEP = {"unpatched": 100, "todo": 25}  # percent
KEEP_AT_LEAST = {"tomesd": 25, "tome": 25}


@dataclass(frozen=True)
class Setting:
    """What is timed, and where."""

    model: str  # a key of `MODELS`
    size: int  # pixels a side
    device: str
    dtype: torch.dtype
    blocks: int | None = None  # of a transformer; None: all

    @property
    def title(self) -> str:
        model, dtype = MODELS[self.model], str(self.dtype).removeprefix("torch.")
        part = "" if self.blocks is None else f", {self.blocks} of {model.blocks} blocks"
        size = f"{self.size} x {self.size}"
        return f"A step of {model.title}{part}, random weights, {size}, batch {BATCH}, {dtype}, on {self.device}"

    def load(self) -> Any:
        return load(self.model, self.device, self.dtype, self.blocks)


@dataclass(frozen=True)
class Candidate:
    name: str
    keep: float  # percent

    def __str__(self) -> str:
        return f"{self.name} {self.keep:g} %"

    @property
    def cells(self) -> tuple[str, str]:
        return f"{self.keep:g} %", self.name


def step_table(setting: Setting, keeps: Sequence[float], names: Sequence[str], repeats: int) -> Table:
    """Candidates in turn, on networks that share their weights."""
    rows = _in_turns(setting, select(keeps, names, setting.model), repeats)
    return Table(setting.title, f"{_note(repeats)} {_legend(setting.model)}", _columns(setting.device), rows)


def compiled_table(setting: Setting, keep: float, repeats: int) -> Table:
    """One candidate after another, each compiled separately, because patching resets the compiler."""
    rows = _compiled(setting, select([keep], COMPILED, setting.model), repeats)
    note = f"{_note(repeats)} Compiled one after another, not in turns."
    return Table(f"{setting.title}, torch.compile", note, _columns(setting.device), rows)


def select(keeps: Sequence[float], names: Sequence[str], model: str) -> list[Candidate]:
    """The unpatched network, then each candidate that suits the model and can keep so few, without repetitions."""
    fitting = [name for name in names if _fits(name, MODELS[model])]
    several = [(keep, name) for keep in keeps for name in fitting if keep >= KEEP_AT_LEAST.get(name, 0)]
    named = [Candidate(name, ALWAYS_KEEP.get(name, keep)) for keep, name in several]
    return list(dict.fromkeys([Candidate("unpatched", 100), *named]))


def _fits(name: str, model: Model) -> bool:
    if model.is_rotary:
        return name in OF_ROTARY
    return name not in (OF_UNETS if model.blocks else OF_TRANSFORMERS)


def _note(repeats: int) -> str:
    return f"Mean over the steps that one clustering serves, median of {repeats}; all layers' clusterings are counted."


def _legend(model: str) -> str:
    wide = "atc-fast-wide: atc-fast with widen_heads."
    if MODELS[model].is_rotary:
        return f"Only keys are merged. {wide}"
    free = f"{wide} {FREE}: atc, clustering time excluded."
    if MODELS[model].blocks:
        return free
    return f"{free} todo: all queries, a quarter of the keys and values. {DEEPER}: atc-fast at the two finest levels."


def _columns(device: str) -> list[str]:
    memory = ["peak MiB beside the weights"] if device == "cuda" else []
    return ["keep", "candidate", "seconds a step", "ratio to unpatched", "clusterings a step", *memory]


@torch.no_grad()
def _in_turns(setting: Setting, candidates: list[Candidate], repeats: int) -> Iterator[Row]:
    network = setting.load()
    runs = {str(each): Denoising(setting, share_weights(network), each) for each in candidates}
    timings = take_turns({name: run.turn for name, run in runs.items()}, repeats, setting.device)
    unpatched = timings["unpatched 100 %"]
    yield from (_cells(run, timings[name], unpatched) for name, run in runs.items())


@torch.no_grad()
def _compiled(setting: Setting, candidates: list[Candidate], repeats: int) -> Iterator[Row]:
    network, unpatched = setting.load(), None
    for candidate in candidates:
        torch.compiler.reset()
        run = Denoising(setting, share_weights(network), candidate)
        run.network.compile()
        # Three periods meet all that is compiled: clustering and reuse, before and after guidance is recognised.
        timing = time_alone(str(candidate), run.turn, repeats, setting.device, warm_ups=3)
        unpatched = unpatched or timing
        yield _cells(run, timing, unpatched)


def _cells(run: "Denoising", timing: Timing, unpatched: Timing) -> Row:
    """A row for a run; `unpatched` took turns of one step."""
    run.check_output()
    step = timing.seconds / run.period
    peak = [mebibytes(timing.peak)] if run.setting.device == "cuda" else []
    return *run.candidate.cells, f"{step:.3g}", f"{step / unpatched.seconds:.2f}", run.clusterings_per_step(), *peak


def share_weights(network: Any) -> Any:
    """A copy that can be patched separately and shares the weights in memory."""
    return copy.deepcopy(network, {id(tensor): tensor for tensor in [*network.parameters(), *network.buffers()]})


class Denoising:
    """A long denoising run of `network`, patched as `candidate` says.

    Attributes:
        period: steps per turn; one clustering serves them all.
        clusterings: of all layers in the last turn.
    """

    def __init__(self, setting: Setting, network: Any, candidate: Candidate) -> None:
        self.setting, self.network, self.candidate = setting, network, candidate
        self.period = patch(network, candidate)
        self.latents, self.inputs = make_inputs(setting.model, network, setting.size)
        # Views of one tensor, like a scheduler's timesteps: their order is known without waiting for a GPU.
        self.timesteps = cycle(torch.arange(999, -1, -1, device=network.device))
        self.noise = torch.Generator().manual_seed(0)  # the same for every candidate
        self.clusterings = 0

    def turn(self) -> None:
        before = self._clusterings_so_far()
        if self.candidate.name != FREE:
            self.latents = repeated(torch.randn(self.latents[:1].shape, generator=self.noise)).to(self.latents)
        for timestep in islice(self.timesteps, self.period):
            self.output = self.network(self.latents, timestep=timestep.expand(BATCH), **self.inputs).sample
        self.clusterings = self._clusterings_so_far() - before

    def clusterings_per_step(self) -> str:
        return f"{self.clusterings / self.period:.3g}" if self.candidate.name in OURS else ""

    def _clusterings_so_far(self) -> int:
        if self.candidate.name not in OURS:
            return 0
        return sum(layer.clusterings for layer in summary(self.network).layers)

    def check_output(self) -> None:
        if not self.output.isfinite().all():
            raise ValueError(f"the output of {self.candidate} is not finite, so its time is meaningless")


def patch(network: nn.Module, candidate: Candidate) -> int:
    """Patch `network`; return the number of steps that a clustering serves."""
    name, r = candidate.name, candidate.keep / 100
    if name in OURS:
        config = OURS[name](r)
        if name == DEEPER:
            config = replace(config, levels=levels(network)[:2])
        apply_patch(network, config)
        return 1 if name == FREE or not config.recluster_threshold else STEPS_A_CLUSTERING
    if name == "tomesd":
        tomesd.apply_patch(network, ratio=1 - r, max_downsample=levels(network)[0])
    elif name == "todo":
        hook_keys(network, 2, interpolate)
    return 1


def levels(network: nn.Module) -> tuple[int, ...]:
    """The levels that have self-attention, the finest first."""
    return tuple(sorted({layer.level for layer in layers(network, "all")}))


def layers(network: nn.Module, levels: Literal["finest", "all"] = "finest") -> tuple[LayerSummary, ...]:
    """The layers that `ATCConfig(levels=levels)` merges."""
    with patched(network, ATCConfig(r=1.0, r_keys=0.5, levels=levels)):
        return summary(network).layers
