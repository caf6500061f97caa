"""A table of LoRA training: forward and backward passes, merged or not, with and without gradient checkpointing."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor
from torch.utils._pytree import tree_map

from benchmark.models import make_inputs
from benchmark.step import Candidate, Setting, patch, select, share_weights
from benchmark.tables import Row, Table, mebibytes
from benchmark.timing import take_turns

TRAINED = ("tomesd", "atc", "atc-fast")
LORA = {"r": 8, "target_modules": ["to_q", "to_k", "to_v", "to_out.0"]}
NOTE = (
    "Forward and backward of a LoRA of rank 8 on all attentions, for one picture; median of {}. Saved: what autograd"
    " keeps of the forward pass for the backward pass, without the weights."
)
COLUMNS = ["checkpointing", "keep", "candidate", "seconds a step", "ratio to unpatched", "saved, MiB"]


def training_table(setting: Setting, keeps: Sequence[float], repeats: int) -> Table:
    """Candidates in turn, on networks that share their weights."""
    rows = _in_turns(setting, select(keeps, TRAINED, setting.model), repeats)
    return Table(setting.title.replace("A step", "LoRA training"), NOTE.format(repeats), COLUMNS, rows)


def _in_turns(setting: Setting, candidates: list[Candidate], repeats: int) -> Iterator[Row]:
    network = setting.load()
    for checkpointing in (False, True):
        runs = {str(each): Training(setting, share_weights(network), each, checkpointing) for each in candidates}
        timings = take_turns({name: run.step for name, run in runs.items()}, repeats, setting.device)
        unpatched = timings["unpatched 100 %"].seconds
        for candidate in candidates:
            seconds, saved = timings[str(candidate)].seconds, runs[str(candidate)].saved_bytes()
            figures = f"{seconds:.3g}", f"{seconds / unpatched:.2f}", mebibytes(saved)
            yield "on" if checkpointing else "off", *candidate.cells, *figures


class Training:
    """A LoRA of a network that is patched as `candidate` says, trained on noise."""

    def __init__(self, setting: Setting, network: Any, candidate: Candidate, checkpointing: bool) -> None:
        self.network = network.train()
        network.add_adapter(LoraConfig(**LORA))
        if checkpointing:
            network.enable_gradient_checkpointing()
        patch(network, candidate)
        latents, inputs = make_inputs(setting.model, network, setting.size)
        self.latents, self.inputs = latents[:1], tree_map(lambda x: x[:1], inputs)

    def step(self) -> None:
        self._loss().backward()
        self.network.zero_grad()

    def saved_bytes(self) -> int:
        """Bytes that the forward pass keeps for the backward pass."""
        storages: dict[int, int] = {}
        weights = {weight.untyped_storage().data_ptr() for weight in self.network.parameters()}

        def keep(x: Tensor) -> Tensor:
            storage = x.untyped_storage()
            if storage.data_ptr() not in weights:
                storages[storage.data_ptr()] = storage.nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            self._loss()
        return sum(storages.values())

    def _loss(self) -> Tensor:
        timestep = torch.randint(1000, (1,), device=self.latents.device)
        output = self.network(torch.randn_like(self.latents), timestep, **self.inputs).sample
        return output.float().square().mean()
