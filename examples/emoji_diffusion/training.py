"""Training that the scripts in this folder share: resumed from checkpoints, with averaged weights."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn


@dataclass(frozen=True)
class Phase:
    """One size at which a part is trained; the rate is the highest of a cosine schedule.

    `merged` is the share of the steps, from the first, with the keys and values of self-attention merged to a tenth.
    """

    name: str
    pixels: int
    batch: int
    steps: int
    rate: float
    merged: float = 0.0


class Training:
    """The optimisation of some modules, resumed from the last checkpoint of its phase if there is one."""

    def __init__(self, modules: Mapping[str, nn.Module], phase: Phase, work: Path) -> None:
        self.phase, self.step, self.checkpoint = phase, 0, work / f"{phase.name}.pt"
        self.parameters = [p for module in modules.values() for p in module.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, weight_decay=1e-3, fused=True)
        self.ema = EMAModel(self.parameters, decay=0.99, foreach=True)
        self.parts: dict[str, Any] = {**modules, "optimizer": self.optimizer, "ema": self.ema}
        if self.checkpoint.exists():
            state = torch.load(self.checkpoint)
            self.step = state.pop("step")
            for name, part in self.parts.items():
                part.load_state_dict(state[name])

    def run(self, loss: Callable[[int], Tensor]) -> None:
        """Minimise `loss`, a function of the step that seeds it, and leave the averaged weights in the modules."""
        while self.step < self.phase.steps:
            torch.manual_seed(self.step)
            value = loss(self.step)
            self.update(value)
            if self.step % 25 == 0 or self.step == self.phase.steps:
                print(f"{self.phase.name} step {self.step} of {self.phase.steps}, loss {value.item():.4f}", flush=True)
                self.save()
        self.ema.copy_to(self.parameters)

    def update(self, loss: Tensor) -> None:
        """One step, with 30 steps of warm-up under a cosine to zero."""
        loss.backward()
        cosine = (1 + math.cos(math.pi * self.step / self.phase.steps)) / 2
        for group in self.optimizer.param_groups:
            group["lr"] = self.phase.rate * cosine * min(1, (self.step + 1) / 30)
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.step(self.parameters)
        self.step += 1

    def save(self) -> None:
        new = self.checkpoint.with_suffix(".new")
        torch.save({name: part.state_dict() for name, part in self.parts.items()} | {"step": self.step}, new)
        new.replace(self.checkpoint)
