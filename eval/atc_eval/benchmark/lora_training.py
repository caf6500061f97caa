"""A table of LoRA training: forward and backward passes, merged or not, with and without gradient checkpointing."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor
from torch.utils._pytree import tree_map

from atc_eval.benchmark.full_size import make_inputs
from atc_eval.benchmark.step import Setting, select, share_weights
from atc_eval.benchmark.timing import Row, mebibytes, table, take_turns
from atc_eval.method import Method

TRAINED = ("tomesd", "atc", "atc-fast")
LORA = {"r": 8, "target_modules": ["to_q", "to_k", "to_v", "to_out.0"]}
NOTE = (
    "Forward and backward of a LoRA of rank 8 on all attentions, for one image; median of {}. Saved: what autograd"
    " keeps of the forward pass for the backward pass, without the weights."
)
COLUMNS = ["checkpointing", "method", "setting", "seconds a step", "ratio to unmerged", "saved, MiB"]


def training_table(setting: Setting, keeps: Sequence[float], repeats: int) -> Iterator[str]:
    """Methods in turn, on networks that share their weights."""
    rows = _in_turns(setting, select(keeps, TRAINED, setting.model), repeats)
    return table(setting.title.replace("A step", "LoRA training"), NOTE.format(repeats), COLUMNS, rows)


def _in_turns(setting: Setting, methods: list[Method], repeats: int) -> Iterator[Row]:
    network = setting.load()
    for checkpointing in (False, True):
        runs = {method: Training(setting, share_weights(network), method, checkpointing) for method in methods}
        timings = take_turns({method: run.step for method, run in runs.items()}, repeats, setting.device)
        for method, run in runs.items():
            seconds, unmerged = timings[method].seconds, timings[Method()].seconds
            named = "on" if checkpointing else "off", method.label, method.setting
            yield *named, f"{seconds:.3g}", f"{seconds / unmerged:.2f}", mebibytes(run.saved_bytes())


class Training:
    """A LoRA of a network, trained on noise with `method` applied."""

    def __init__(self, setting: Setting, network: Any, method: Method, checkpointing: bool) -> None:
        self.network = network.train()
        network.add_adapter(LoraConfig(**LORA))
        if checkpointing:
            network.enable_gradient_checkpointing()
        self.applied = ExitStack()  # never closed: the network is this run's own
        self.applied.enter_context(method.applied(network))
        latents, inputs = make_inputs(setting.model, network, setting.size)
        self.latents, self.inputs = latents[:1], tree_map(lambda x: x[:1], inputs)

    def step(self) -> None:
        self._loss().backward()
        self.network.zero_grad()

    def saved_bytes(self) -> int:
        """Bytes that the forward pass keeps for the backward pass."""
        storages: dict[int, int] = {}
        with torch.autograd.graph.saved_tensors_hooks(partial(_note_storage, storages), lambda x: x):
            self._loss()
        weights = {weight.untyped_storage().data_ptr() for weight in self.network.parameters()}
        return sum(size for place, size in storages.items() if place not in weights)

    def _loss(self) -> Tensor:
        timestep = torch.randint(1000, (1,), device=self.latents.device)
        output = self.network(torch.randn_like(self.latents), timestep, **self.inputs).sample
        return output.float().square().mean()


def _note_storage(storages: dict[int, int], x: Tensor) -> Tensor:
    storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
    return x
