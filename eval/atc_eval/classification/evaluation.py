"""Top-1 accuracy of a model: the images it classifies correctly, in one file for each method."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
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

from atc_eval.classification.reductions import Trial
from atc_eval.files import read_json, write_json
from atc_eval.method import Method
from atc_eval.score.bootstrap import Draws, Estimate


@dataclass(frozen=True, eq=False)
class Task:
    """A model and the images that it is tested on.

    Attributes:
        name: in words.
        images: pairs of an image `[3, H, W]`, as the model takes it, and its class.
        subjects: `[n]`, what each image shows; the bootstrap draws images of one subject together.
        shown: indices of the images whose clusters are shown.
        visible: makes an image visible, `[H, W, 3]` from 0 to 1.
        finetune: trains a copy of the model with a reduction in place; None if it cannot be trained.
    """

    name: str
    model: VisionTransformer
    images: Dataset[Any]
    subjects: NDArray[np.int64]
    shown: list[int]
    visible: Callable[[torch.Tensor], NDArray[np.floating[Any]]]
    finetune: Callable[[Method], VisionTransformer] | None = None


@dataclass(frozen=True, eq=False)
class Evaluation:
    """One trial: whether each image was classified correctly, `[n]`, and its speed on one device."""

    trial: Trial
    correct: NDArray[np.bool_]
    images_per_second: float

    @property
    def accuracy(self) -> float:
        """Top-1 in percent."""
        return float(100 * self.correct.mean())


def evaluate(task: Task, trial: Trial, out: Path, batch_size: int, state: PartialState) -> Evaluation:
    """Classify all images, unless the file of an earlier run is there."""
    file = out / "methods" / trial.file
    if not file.exists():
        model = task.finetune(trial.method) if trial.finetuned and task.finetune else task.model
        correct, images_per_second = _classify(model, task, trial.method, batch_size, state)
        if state.is_main_process:
            write_json(file, {"images_per_second": images_per_second, "correct": correct})
        state.wait_for_everyone()
    record = read_json(file)
    return Evaluation(trial, np.array(record["correct"], bool), record["images_per_second"])


def _classify(
    model: nn.Module, task: Task, method: Method, batch_size: int, state: PartialState
) -> tuple[list[int], float]:
    numbers = range(state.process_index, len(task.subjects), state.num_processes)
    model = model.to(state.device).eval()
    with method.applied(model):
        seconds, correct = zip(*_batches(model, task.images, numbers, batch_size, state), strict=True)
    own = dict(zip(numbers, (entry for batch in correct for entry in batch), strict=True))
    everyone = dict(gather_object(list(own.items())))
    typical = float(np.median(np.array(seconds) / [len(batch) for batch in correct]))
    return [everyone[number] for number in range(len(task.subjects))], 1 / typical


@torch.no_grad()
def _batches(
    model: nn.Module, dataset: Dataset[Any], numbers: range, batch_size: int, state: PartialState
) -> Iterator[tuple[float, list[int]]]:
    """For each batch, its seconds and, for each image, 1 if it is classified correctly, else 0."""
    loader = DataLoader(Subset(dataset, numbers), batch_size, num_workers=4 if state.device.type == "cuda" else 0)
    for images, classes in tqdm(loader, desc="classifying", disable=not state.is_main_process, leave=False):
        images = images.to(state.device)
        start = time.perf_counter()
        predicted = model(images).argmax(dim=1).cpu()  # waits for the device
        yield time.perf_counter() - start, (predicted == classes).int().tolist()


def mean_by_subject(values: NDArray[Any], subjects: NDArray[np.int64], draws: Draws) -> Estimate:
    """The mean of `values` `[n]`, one per image, with a bootstrap over the subjects by `draws` `[B, S]`."""
    _, subject = np.unique(subjects, return_inverse=True)
    totals, counts = np.bincount(subject, values), np.bincount(subject)
    return Estimate.of(values.mean(), totals[draws].sum(axis=1) / counts[draws].sum(axis=1))
