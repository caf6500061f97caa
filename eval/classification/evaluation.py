"""Top-1 accuracy of a model: the pictures it classifies correctly, in one file per way of reducing its tokens."""

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from numpy.typing import NDArray
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from classification.methods import Way
from files import read_json, write_json
from score.bootstrap import Draws, Estimate


@dataclass(frozen=True, eq=False)
class Task:
    """A model and the pictures that it is tested on.

    Attributes:
        name: in words.
        pictures: pairs of a picture `[3, H, W]`, as the model takes it, and its class.
        subjects: `[n]`, what each picture shows; the bootstrap draws pictures of one subject together.
        shown: indices of the pictures whose clusters are shown.
        visible: makes a picture visible, `[H, W, 3]` from 0 to 1.
        finetune: trains a copy of the model with a reduction in place; None if it cannot be trained.
    """

    name: str
    model: VisionTransformer
    pictures: Dataset[Any]
    subjects: NDArray[np.int64]
    shown: list[int]
    visible: Callable[[torch.Tensor], NDArray[np.floating[Any]]]
    finetune: Callable[[Way], VisionTransformer] | None = None


@dataclass(frozen=True, eq=False)
class Evaluation:
    """One way: whether each picture was classified correctly, `[n]`, and its speed on one device."""

    way: Way
    correct: NDArray[np.bool_]
    images_per_second: float

    @property
    def accuracy(self) -> float:
        """Top-1 in percent."""
        return float(100 * self.correct.mean())


def evaluate(task: Task, way: Way, out: Path, batch_size: int, state: PartialState) -> Evaluation:
    """Classify all pictures, unless the file of an earlier run is there."""
    file = out / "ways" / way.file
    if not file.exists():
        model = task.finetune(way) if way.finetuned and task.finetune else task.model
        correct, images_per_second = _classify(model, task, way, batch_size, state)
        if state.is_main_process:
            record = {"way": asdict(way), "images_per_second": images_per_second, "correct": correct}
            write_json(file, record)
        state.wait_for_everyone()
    record = read_json(file)
    return Evaluation(Way(**record["way"]), np.array(record["correct"], bool), record["images_per_second"])


def _classify(model: nn.Module, task: Task, way: Way, batch_size: int, state: PartialState) -> tuple[list[int], float]:
    numbers = range(state.process_index, len(task.subjects), state.num_processes)
    model = model.to(state.device).eval()
    with way.applied(model):
        seconds, correct = zip(*_batches(model, task.pictures, numbers, batch_size, state), strict=True)
    own = dict(zip(numbers, (entry for batch in correct for entry in batch), strict=True))
    everyone = dict(gather_object(list(own.items())))
    typical = float(np.median(np.array(seconds) / [len(batch) for batch in correct]))
    return [everyone[number] for number in range(len(task.subjects))], 1 / typical


@torch.no_grad()
def _batches(
    model: nn.Module, pictures: Dataset[Any], numbers: range, batch_size: int, state: PartialState
) -> Iterator[tuple[float, list[int]]]:
    """For each batch, its seconds and, for each picture, 1 if it is classified correctly, else 0."""
    loader = DataLoader(Subset(pictures, numbers), batch_size, num_workers=4 if state.device.type == "cuda" else 0)
    for images, classes in tqdm(loader, desc="classifying", disable=not state.is_main_process, leave=False):
        images = images.to(state.device)
        start = time.perf_counter()
        predicted = model(images).argmax(dim=1).cpu()  # waits for the device
        yield time.perf_counter() - start, (predicted == classes).int().tolist()


def mean_by_subject(values: NDArray[Any], subjects: NDArray[np.int64], draws: Draws) -> Estimate:
    """The mean of `values` `[n]`, one per picture, with a bootstrap over the subjects by `draws` `[B, S]`."""
    _, subject = np.unique(subjects, return_inverse=True)
    totals, counts = np.bincount(subject, values), np.bincount(subject)
    return Estimate.of(values.mean(), totals[draws].sum(axis=1) / counts[draws].sum(axis=1))
