"""Tables of a UNet's denoising steps: unpatched, merged by this project, and patched by its peers.

Reusing a clustering makes steps unequal, so what is timed is a *period*: as many consecutive steps of one long run as
a clustering serves, of which exactly one clusters. A candidate warms up by one period, in which guidance halves are
found out, and each of its turns continues the run by another. The mean step of a turn is that of any long run.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import cycle, islice
from typing import Any

import tomesd
import torch
from diffusers import UNet2DConditionModel
from speed_attention import precision
from speed_tables import Rows, Table, mebibytes
from speed_timing import Timing, take_turns
from torch import Tensor, nn

from atc_diffusion import ATCConfig, LayerSummary, apply_patch, patched, summary

UNET: dict[str, dict[str, Any]] = {
    "sd15": {"sample_size": 64, "cross_attention_dim": 768},
    "sdxl": {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "use_linear_projection": True,
        "cross_attention_dim": 2048,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
TITLES = {"sd15": "Stable Diffusion v1.5", "sdxl": "SDXL"}

BATCH = 2  # a picture under guidance

FREE = "atc-free"  # as atc, with groupings that are all found in the warm-up
DEEPER = "atc-fast-2"  # as atc-fast, at the two finest levels
ATC: dict[str, Callable[[float], ATCConfig]] = {
    "atc-paper": ATCConfig.paper,
    "atc": lambda r: ATCConfig(r=r),
    FREE: lambda r: ATCConfig(r=r, refresh_every=1000),
    "atc-fast": ATCConfig.fast,
    DEEPER: ATCConfig.fast,
}
CANDIDATES = ("tomesd", "todo", *ATC)
COMPILED = ("unpatched", "atc", "atc-fast")
ALWAYS_KEEP = {"unpatched": 100, "todo": 25}  # percent
KEEP_AT_LEAST = {"tomesd": 25}


@dataclass(frozen=True)
class Candidate:
    name: str
    keep: int  # percent

    def __str__(self) -> str:
        return f"{self.name} {self.keep} %"

    @property
    def cells(self) -> tuple[str, str]:
        return f"{self.keep} %", self.name


def step_table(model: str, size: int, keeps: Sequence[int], names: Sequence[str], repeats: int, device: str) -> Table:
    """Candidates in turn, on UNets that share their weights."""
    candidates = select(keeps, names)
    rows = Rows([each.cells for each in candidates], partial(_in_turns, model, size, candidates, repeats, device))
    note = (
        f"{_note(repeats)} todo keeps every query, and a quarter of the keys and values. {FREE} is atc with groupings"
        f" that were found before: what a clustering that costs nothing would give. {DEEPER} is atc-fast at the two"
        " finest levels."
    )
    return Table(_title(model, size, device), note, _columns(device), [rows])


def compiled_table(model: str, size: int, keep: int, repeats: int, device: str) -> Table:
    """One candidate after another, each compiled anew: patching resets the compiler."""
    candidates = select([keep], COMPILED)
    rows = Rows([each.cells for each in candidates], partial(_compiled, model, size, candidates, repeats, device))
    note = f"{_note(repeats)} Compiled one after another, not in turns."
    return Table(f"{_title(model, size, device)}, torch.compile", note, _columns(device), [rows])


def select(keeps: Sequence[int], names: Sequence[str]) -> list[Candidate]:
    """What is compared, each once: the unpatched UNet, then whatever can keep so few."""
    several = [(keep, name) for keep in keeps for name in names if keep >= KEEP_AT_LEAST.get(name, 0)]
    named = [Candidate(name, ALWAYS_KEEP.get(name, keep)) for keep, name in several]
    return list(dict.fromkeys([Candidate("unpatched", 100), *named]))


def _title(model: str, size: int, device: str) -> str:
    dtype = str(precision(device)).removeprefix("torch.")
    return f"A step of {TITLES[model]}'s UNet, random weights, {size} x {size}, batch {BATCH}, {dtype}, on {device}"


def _note(repeats: int) -> str:
    return f"Mean over the steps that one clustering serves, median of {repeats}; clusterings: of all layers together."


def _columns(device: str) -> list[str]:
    memory = ["peak MiB beside the weights"] if device == "cuda" else []
    return ["keep", "candidate", "seconds a step", "ratio to unpatched", "clusterings a step", *memory]


@torch.no_grad()
def _in_turns(model: str, size: int, candidates: list[Candidate], repeats: int, device: str) -> list[list[str]]:
    unet = load(model, device)
    runs = {str(each): Denoising(share_weights(unet), each, size) for each in candidates}
    timings = take_turns({name: run.turn for name, run in runs.items()}, repeats, device)
    return [_cells(run, timings[name], timings["unpatched 100 %"], device) for name, run in runs.items()]


@torch.no_grad()
def _compiled(model: str, size: int, candidates: list[Candidate], repeats: int, device: str) -> list[list[str]]:
    unet = load(model, device)
    runs, timings = [], []
    for candidate in candidates:
        torch.compiler.reset()
        run = Denoising(share_weights(unet), candidate, size)
        run.unet.compile()
        # Three periods meet all that is compiled: clustering and reusing, before and after guidance is known.
        timings.append(take_turns({str(candidate): run.turn}, repeats, device, warm_ups=3)[str(candidate)])
        runs.append(run)
    return [_cells(run, timing, timings[0], device) for run, timing in zip(runs, timings, strict=True)]


def _cells(run: "Denoising", timing: Timing, unpatched: Timing, device: str) -> list[str]:
    """What a table tells of a run; the unpatched one takes turns of one step."""
    run.check_output()
    step = timing.seconds / run.period
    peak = [mebibytes(timing.peak)] if device == "cuda" else []
    return [f"{step:.3g}", f"{step / unpatched.seconds:.2f}", run.clusterings_a_step(), *peak]


@lru_cache(maxsize=1)
def load(model: str, device: str) -> UNet2DConditionModel:
    torch.manual_seed(0)
    with torch.device(device):
        unet = UNet2DConditionModel(**UNET[model])
    return unet.eval().requires_grad_(False).to(precision(device))


def share_weights(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """A copy to patch on its own, with the same weights in memory."""
    return copy.deepcopy(unet, {id(tensor): tensor for tensor in [*unet.parameters(), *unet.buffers()]})


class Denoising:
    """A long denoising run of `unet`, once patched as `candidate` says.

    Attributes:
        period: steps that a clustering serves; a turn has as many.
        clusterings: in the last turn, of all layers together.
    """

    def __init__(self, unet: UNet2DConditionModel, candidate: Candidate, size: int) -> None:
        self.unet, self.candidate = unet, candidate
        self.period = patch(unet, candidate)
        self.sample, self.inputs = make_inputs(unet, size)
        # Entries of one tensor, as a scheduler's are: their order is known without waiting for a GPU.
        self.timesteps = cycle(torch.arange(999, -1, -1, device=unet.device))
        self.clusterings = 0

    def turn(self) -> None:
        before = self._clusterings_so_far()
        for timestep in islice(self.timesteps, self.period):
            self.output = self.unet(self.sample, timestep, **self.inputs).sample
        self.clusterings = self._clusterings_so_far() - before

    def clusterings_a_step(self) -> str:
        """Of the last turn."""
        return f"{self.clusterings / self.period:.3g}" if self.candidate.name in ATC else ""

    def _clusterings_so_far(self) -> int:
        return sum(layer.clusterings for layer in summary(self.unet).layers) if self.candidate.name in ATC else 0

    def check_output(self) -> None:
        if not self.output.isfinite().all():
            raise ValueError(f"the output of {self.candidate} is not finite, so that its time would mean nothing")


def make_inputs(unet: UNet2DConditionModel, size: int) -> tuple[Tensor, dict[str, Any]]:
    """A picture's latents, the same for both halves of its guidance, and their text."""
    draw = partial(torch.randn, device=unet.device, dtype=unet.dtype)
    sample = draw(1, 4, size // 8, size // 8).repeat(BATCH, 1, 1, 1)
    inputs: dict[str, Any] = {"encoder_hidden_states": draw(BATCH, 77, unet.config.cross_attention_dim)}
    if unet.config.addition_embed_type == "text_time":
        pooled = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
        times = torch.tensor([[size, size, 0, 0, size, size]] * BATCH, device=unet.device)
        inputs["added_cond_kwargs"] = {"text_embeds": draw(BATCH, pooled), "time_ids": times}
    return sample, inputs


def patch(unet: UNet2DConditionModel, candidate: Candidate) -> int:
    """Patch `unet`; return how many steps a clustering will serve."""
    name, r = candidate.name, candidate.keep / 100
    if name in ATC:
        config = ATC[name](r)
        apply_patch(unet, replace(config, max_downsample=2 * finest_level(unet)) if name == DEEPER else config)
        return 1 if name == FREE else config.refresh_every
    if name == "tomesd":
        tomesd.apply_patch(unet, ratio=1 - r, max_downsample=finest_level(unet))
    elif name == "todo":
        downsample_keys_values(unet)
    return 1


def finest_level(unet: UNet2DConditionModel) -> int:
    return layers(unet)[0].downsample


def layers(unet: UNet2DConditionModel, max_downsample: int | None = None) -> tuple[LayerSummary, ...]:
    """The layers that `ATCConfig(max_downsample=...)` merges; None: those that are merged unless told otherwise."""
    with patched(unet, ATCConfig(max_downsample=max_downsample)):
        return summary(unet).layers


def downsample_keys_values(unet: UNet2DConditionModel) -> None:
    """In the style of ToDo (Smith et al. 2024): attend to every second token of every second row."""
    for layer in layers(unet):
        unet.get_submodule(f"{layer.name}.attn1").register_forward_pre_hook(_attend_to_a_quarter, with_kwargs=True)


def _attend_to_a_quarter(attn: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    side = math.isqrt(args[0].shape[1])  # the pictures are square
    quarter = args[0].unflatten(1, (side, side))[:, ::2, ::2].flatten(1, 2)
    return args, kwargs | {"encoder_hidden_states": quarter}
