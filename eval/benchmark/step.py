"""Tables of a network's denoising steps: unpatched, merged by this project, and patched by its peers.

Reusing a clustering makes steps unequal, so the unit of timing is a *period*: as many consecutive steps of one long run
as a clustering serves, of which exactly one clusters, because its latents are new. A candidate warms up by one period,
and each of its turns continues the run by another. The mean step of a turn is that of any long run.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle, islice
from typing import Any, Literal

import tomesd
import torch
from torch import nn

from atc_diffusion import ATCConfig, LayerSummary, MergeConfig, ToMeConfig, apply_patch, patched, summary
from benchmark.models import BATCH, MODELS, Model, load, make_inputs, repeated
from benchmark.tables import Rows, Table, mebibytes
from benchmark.timing import Timing, take_turns

STEPS_A_CLUSTERING = 3  # about as many as one serves in a run of 20 steps
FREE = "atc-free"  # as atc, with clusters that are all found in the warm-up
DEEPER = "atc-fast-2"  # as atc-fast, at the two finest levels
OURS: dict[str, Callable[[float], MergeConfig]] = {
    "tome": lambda r: ToMeConfig(r=r),
    "atc-paper": ATCConfig.paper,
    "atc": lambda r: ATCConfig(r=r),
    FREE: lambda r: ATCConfig(r=r, recluster_threshold=math.inf),
    "atc-share-2": lambda r: ATCConfig(r=r, share_layers=2),
    "atc-share-4": lambda r: ATCConfig(r=r, share_layers=4),
    "atc-fast": ATCConfig.fast,
    DEEPER: ATCConfig.fast,
}
CANDIDATES = ("tomesd", "todo", *OURS)
OF_UNETS = ("tomesd", "todo", DEEPER)
OF_TRANSFORMERS = ("tome", "atc-share-2", "atc-share-4")
OF_ROTARY = ("unpatched", "atc-fast")
COMPILED = ("unpatched", "atc", "atc-fast")
ALWAYS_KEEP = {"unpatched": 100, "todo": 25}  # percent
KEEP_AT_LEAST = {"tomesd": 25, "tome": 25}


@dataclass(frozen=True)
class Setting:
    """What is timed, and where.

    Attributes:
        model: a name in `MODELS`.
        size: pixels a side.
        device: "cpu" or "cuda".
        dtype: of weights and latents.
        blocks: how many of a transformer's blocks; None: all.
    """

    model: str
    size: int
    device: str
    dtype: torch.dtype
    blocks: int | None = None

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
    keep: int  # percent

    def __str__(self) -> str:
        return f"{self.name} {self.keep} %"

    @property
    def cells(self) -> tuple[str, str]:
        return f"{self.keep} %", self.name


def step_table(setting: Setting, keeps: Sequence[int], names: Sequence[str], repeats: int) -> Table:
    """Candidates in turn, on networks that share their weights."""
    candidates = select(keeps, names, setting.model)
    rows = Rows([each.cells for each in candidates], partial(_in_turns, setting, candidates, repeats))
    return Table(setting.title, f"{_note(repeats)} {_legend(setting.model)}", _columns(setting.device), [rows])


def compiled_table(setting: Setting, keep: int, repeats: int) -> Table:
    """One candidate after another, each compiled by itself: patching resets the compiler."""
    candidates = select([keep], COMPILED, setting.model)
    rows = Rows([each.cells for each in candidates], partial(_compiled, setting, candidates, repeats))
    note = f"{_note(repeats)} Compiled one after another, not in turns."
    return Table(f"{setting.title}, torch.compile", note, _columns(setting.device), [rows])


def select(keeps: Sequence[int], names: Sequence[str], model: str) -> list[Candidate]:
    """What is compared, each once: the unpatched network, then whatever fits it and can keep so few."""
    fitting = [name for name in names if _fits(name, MODELS[model])]
    several = [(keep, name) for keep in keeps for name in fitting if keep >= KEEP_AT_LEAST.get(name, 0)]
    named = [Candidate(name, ALWAYS_KEEP.get(name, keep)) for keep, name in several]
    return list(dict.fromkeys([Candidate("unpatched", 100), *named]))


def _fits(name: str, model: Model) -> bool:
    if model.is_rotary:
        return name in OF_ROTARY
    return name not in (OF_UNETS if model.blocks else OF_TRANSFORMERS)


def _note(repeats: int) -> str:
    return f"Mean over the steps that one clustering serves, median of {repeats}; clusterings: of all layers together."


def _legend(model: str) -> str:
    if MODELS[model].is_rotary:
        return "keep: of the keys; all queries are kept."
    free = f"{FREE}: atc, clustering time excluded."
    if MODELS[model].blocks:
        return f"{free} atc-share-2 and -4: one clustering serves as many consecutive layers."
    return (
        f"{free} todo: every query, and a quarter of the keys and values. {DEEPER}: atc-fast at the two finest levels."
    )


def _columns(device: str) -> list[str]:
    memory = ["peak MiB beside the weights"] if device == "cuda" else []
    return ["keep", "candidate", "seconds a step", "ratio to unpatched", "clusterings a step", *memory]


@torch.no_grad()
def _in_turns(setting: Setting, candidates: list[Candidate], repeats: int) -> list[list[str]]:
    network = setting.load()
    runs = {str(each): Denoising(setting, share_weights(network), each) for each in candidates}
    timings = take_turns({name: run.turn for name, run in runs.items()}, repeats, setting.device)
    return [_cells(run, timings[name], timings["unpatched 100 %"]) for name, run in runs.items()]


@torch.no_grad()
def _compiled(setting: Setting, candidates: list[Candidate], repeats: int) -> list[list[str]]:
    network = setting.load()
    runs, timings = [], []
    for candidate in candidates:
        torch.compiler.reset()
        run = Denoising(setting, share_weights(network), candidate)
        run.network.compile()
        # Three periods meet all that is compiled: clustering and reusing, before and after guidance is known.
        timings.append(take_turns({str(candidate): run.turn}, repeats, setting.device, warm_ups=3)[str(candidate)])
        runs.append(run)
    return [_cells(run, timing, timings[0]) for run, timing in zip(runs, timings, strict=True)]


def _cells(run: "Denoising", timing: Timing, unpatched: Timing) -> list[str]:
    """What a table tells of a run; the unpatched one takes turns of one step."""
    run.check_output()
    step = timing.seconds / run.period
    peak = [mebibytes(timing.peak)] if run.setting.device == "cuda" else []
    return [f"{step:.3g}", f"{step / unpatched.seconds:.2f}", run.clusterings_a_step(), *peak]


def share_weights(network: Any) -> Any:
    """A copy to patch on its own, with the same weights in memory."""
    return copy.deepcopy(network, {id(tensor): tensor for tensor in [*network.parameters(), *network.buffers()]})


class Denoising:
    """A long denoising run of `network`, once patched as `candidate` says.

    Attributes:
        period: steps that a clustering serves; a turn has as many.
        clusterings: in the last turn, of all layers together.
    """

    def __init__(self, setting: Setting, network: Any, candidate: Candidate) -> None:
        self.setting, self.network, self.candidate = setting, network, candidate
        self.period = patch(network, candidate)
        self.latents, self.inputs = make_inputs(setting.model, network, setting.size)
        # Entries of one tensor, as a scheduler's are: their order is known without waiting for a GPU.
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

    def clusterings_a_step(self) -> str:
        """Of the last turn."""
        return f"{self.clusterings / self.period:.3g}" if self.candidate.name in OURS else ""

    def _clusterings_so_far(self) -> int:
        if self.candidate.name not in OURS:
            return 0
        return sum(layer.clusterings for layer in summary(self.network).layers)

    def check_output(self) -> None:
        if not self.output.isfinite().all():
            raise ValueError(f"the output of {self.candidate} is not finite, so that its time would mean nothing")


def patch(network: nn.Module, candidate: Candidate) -> int:
    """Patch `network`; return how many steps a clustering will serve."""
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
        downsample_keys_values(network)
    return 1


def levels(network: nn.Module) -> tuple[int, ...]:
    """Those that have self-attention, from the finest."""
    return tuple(sorted({layer.level for layer in layers(network, "all")}))


def layers(network: nn.Module, levels: Literal["finest", "all"] = "finest") -> tuple[LayerSummary, ...]:
    """The layers that `ATCConfig(levels=levels)` merges."""
    with patched(network, ATCConfig(r=1.0, r_keys=0.5, levels=levels)):
        return summary(network).layers


def downsample_keys_values(network: nn.Module) -> None:
    """In the style of ToDo (Smith et al. 2024): attend to every second token of every second row."""
    for layer in layers(network):
        network.get_submodule(layer.name).register_forward_pre_hook(_attend_to_a_quarter, with_kwargs=True)


def _attend_to_a_quarter(attn: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    side = math.isqrt(args[0].shape[1])  # the pictures are square
    quarter = args[0].unflatten(1, (side, side))[:, ::2, ::2].flatten(1, 2)
    return args, kwargs | {"encoder_hidden_states": quarter}
