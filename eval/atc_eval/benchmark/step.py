"""Tables of a network's denoising step: its arithmetic, and its time unmerged, merged by this project, and by rivals.

Steps that reuse a clustering are faster than the step that makes it, so the unit of timing is a *period*: the steps of
one long run that a clustering serves, of which the first clusters because its latents are new. A method warms up for
one period, and each of its turns continues the run by another.
"""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from atc_diffusion import ATCConfig, MergeConfig, ToMeConfig, summary
from atc_eval.benchmark.full_size import BATCH, MODELS, Model, load, make_inputs, repeated
from atc_eval.benchmark.timing import Row, Timing, mebibytes, table, take_turns
from atc_eval.method import Method
from atc_eval.rivals import Rival, merged_layers

STEPS_A_CLUSTERING = 3  # about as many as one serves in a run of 20 steps
METHODS: dict[str, Callable[[float, Model], Method]] = {  # by fraction kept
    "tomesd": lambda r, model: Method(rival=Rival("tomesd", 100 * r)),
    "todo": lambda r, model: Method(rival=Rival("todo", 2)),
    "tome": lambda r, model: Method(ToMeConfig(r=r)),
    "atc-paper": lambda r, model: Method(ATCConfig.paper(r)),
    "atc": lambda r, model: Method(ATCConfig(r=r)),
    "atc-free": lambda r, model: Method(ATCConfig(r=r, recluster_threshold=math.inf)),
    "atc-fast": lambda r, model: Method(ATCConfig.fast(r)),
    "atc-fast-each-step": lambda r, model: Method(ATCConfig.fast(r, recluster_threshold=0)),
    "atc-fast-wide": lambda r, model: Method(ATCConfig.fast(r, widen_heads=True)),
    "atc-fast-2": lambda r, model: Method(ATCConfig.fast(r, levels=model.levels)),
}
OF_UNETS = ("tomesd", "todo", "atc-fast-2")
OF_TRANSFORMERS = ("tome",)
OF_ROTARY = ("atc-fast", "atc-fast-each-step", "atc-fast-wide")
COMPILED = ("atc", "atc-fast")
KEEP_AT_LEAST = {"tomesd": 0.25, "tome": 0.25}
ARITHMETIC = (
    "The products of queries with keys and of attention weights with values, 4 N² C operations per attention, as a "
    "fraction of the operations that PyTorch counts for the whole network. Merging saves at most 1 - r · r_keys of a "
    "level's fraction. Time follows only roughly, because attention may run slower per operation than convolutions do."
)


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


def step_table(setting: Setting, keeps: Sequence[float], names: Sequence[str], repeats: int) -> Iterator[str]:
    """Methods in turn, on networks that share their weights."""
    is_rotary = MODELS[setting.model].is_rotary
    legend = "Only keys are merged." if is_rotary else "With recluster_threshold=inf, clustering time is excluded."
    rows = _in_turns(setting, select(keeps, names, setting.model), repeats)
    return _table(setting.title, legend, setting, repeats, rows)


def compiled_table(setting: Setting, keep: float, repeats: int) -> Iterator[str]:
    """One method after another, each compiled separately, because patching resets the compiler."""
    rows = _compiled(setting, select([keep], COMPILED, setting.model), repeats)
    legend = "Compiled one after another, not in turns."
    return _table(f"{setting.title}, torch.compile", legend, setting, repeats, rows)


def select(keeps: Sequence[float], names: Sequence[str], model: str) -> list[Method]:
    """The unmerged network, then each method that suits the model and can keep so few, without repetitions."""
    network = MODELS[model]
    unfit = set(METHODS) - set(OF_ROTARY) if network.is_rotary else OF_UNETS if network.blocks else OF_TRANSFORMERS
    fitting = [name for name in names if name not in unfit]
    chosen = [METHODS[name](keep, network) for keep in keeps for name in fitting if keep >= KEEP_AT_LEAST.get(name, 0)]
    return list(dict.fromkeys([Method(), *chosen]))


def _table(title: str, legend: str, setting: Setting, repeats: int, rows: Iterator[Row]) -> Iterator[str]:
    note = (
        f"Mean over the {STEPS_A_CLUSTERING} steps that one clustering serves (1 where every step clusters), median of "
        f"{repeats}; all layers' clusterings are counted. {legend}"
    )
    memory = ["peak MiB beside the weights"] if setting.device == "cuda" else []
    columns = ["method", "setting", "seconds a step", "ratio to unmerged", "clusterings a step", *memory]
    return table(title, note, columns, rows)


@torch.no_grad()
def _in_turns(setting: Setting, methods: list[Method], repeats: int) -> Iterator[Row]:
    network = setting.load()
    runs = {method: Denoising(setting, share_weights(network), method) for method in methods}
    timings = take_turns({method: run.turn for method, run in runs.items()}, repeats, setting.device)
    yield from (_cells(run, timings[method], timings[Method()]) for method, run in runs.items())


@torch.no_grad()
def _compiled(setting: Setting, methods: list[Method], repeats: int) -> Iterator[Row]:
    network, unmerged = setting.load(), None
    for method in methods:
        torch.compiler.reset()
        run = Denoising(setting, share_weights(network), method)
        run.network.compile()
        # Three periods meet all that is compiled: clustering and reuse, before and after guidance is recognised.
        [timing] = take_turns({method: run.turn}, repeats, setting.device, warm_ups=3).values()
        unmerged = unmerged or timing
        yield _cells(run, timing, unmerged)


def _cells(run: "Denoising", timing: Timing, unmerged: Timing) -> Row:
    """A row for a run; `unmerged` took turns of one step."""
    run.check_output()
    step = timing.seconds / run.period
    peak = [mebibytes(timing.peak)] if run.setting.device == "cuda" else []
    method, ratio = run.method, f"{step / unmerged.seconds:.2f}"
    return method.label, method.setting, f"{step:.3g}", ratio, run.clusterings_per_step(), *peak


def share_weights(network: Any) -> Any:
    """A copy that can be patched separately and shares the weights in memory."""
    return copy.deepcopy(network, {id(tensor): tensor for tensor in [*network.parameters(), *network.buffers()]})


class Denoising:
    """A long denoising run of `network` by `method`."""

    def __init__(self, setting: Setting, network: Any, method: Method) -> None:
        self.setting, self.network, self.method = setting, network, method
        self.config = method.config if isinstance(method.config, MergeConfig) else None
        self.is_free = self.config is not None and self.config.recluster_threshold == math.inf
        reuses = self.config and self.config.recluster_threshold and not self.is_free
        self.period = STEPS_A_CLUSTERING if reuses else 1  # steps per turn; one clustering serves them all
        self.applied = ExitStack()  # never closed: the network is this run's own
        self.applied.enter_context(method.applied(network))
        self.latents, self.inputs = make_inputs(setting.model, network, setting.size)
        # Views of one tensor, like a scheduler's timesteps: their order is known without waiting for a GPU.
        self.timesteps = cycle(torch.arange(999, -1, -1, device=network.device))
        self.noise = torch.Generator().manual_seed(0)  # the same for every method
        self.clusterings = 0  # of all layers in the last turn

    def turn(self) -> None:
        before = self._clusterings_so_far()
        if not self.is_free:
            self.latents = repeated(torch.randn(self.latents[:1].shape, generator=self.noise)).to(self.latents)
        for timestep in islice(self.timesteps, self.period):
            time = timestep / 1000 if MODELS[self.setting.model].is_rotary else timestep
            self.output = self.network(self.latents, timestep=time.expand(BATCH), **self.inputs).sample
        self.clusterings = self._clusterings_so_far() - before

    def clusterings_per_step(self) -> str:
        return f"{self.clusterings / self.period:.3g}" if self.config else ""

    def _clusterings_so_far(self) -> int:
        return sum(layer.clusterings for layer in summary(self.network).layers) if self.config else 0

    def check_output(self) -> None:
        if not self.output.isfinite().all():
            raise ValueError(f"the output of {self.method} is not finite, so its time is meaningless")


def arithmetic_table(settings: Sequence[Setting]) -> Iterator[str]:
    """How much self-attention could save: its fraction of a network's arithmetic."""
    title = f"What there is to save: the arithmetic of a step, batch {BATCH}"
    return table(title, ARITHMETIC, ["network", "image", "TFLOP", "finest level", "second level"], _count(settings))


def _count(settings: Sequence[Setting]) -> Iterator[Row]:
    for setting in settings:
        model, size = setting.model, setting.size
        with torch.device("meta"):
            network = MODELS[model].build()
        latents, inputs = make_inputs(model, network, size)
        with FlopCounterMode(display=False) as counter:
            network(latents, timestep=torch.zeros(BATCH, device="meta"), **inputs)
        total, finest = counter.get_total_flops(), min(layer.level for layer in merged_layers(network, "all"))
        fractions = [f"{self_attention(network, size, level) / total:.1%}" for level in (finest, 2 * finest)]
        yield MODELS[model].title, f"{size} x {size}", f"{total / 1e12:.3g}", *fractions


def self_attention(network: Any, size: int, level: int) -> int:
    """Operations of the products of queries, keys and values at one level; 0 if it has no self-attention."""
    num_tokens = (size // 8 // level) ** 2
    widths = [layer.channels for layer in merged_layers(network, "all") if layer.level == level]
    return sum(4 * BATCH * num_tokens**2 * width for width in widths)
