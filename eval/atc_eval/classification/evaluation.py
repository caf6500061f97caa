"""Which reductions of a vision transformer's tokens are compared, and the images that each classifies correctly."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from numpy.typing import NDArray
from timm.models.vision_transformer import VisionTransformer
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from atc_diffusion import ViTConfig
from atc_diffusion.clustering import LINKAGES
from atc_diffusion.commands import check_number
from atc_eval.command_line import parse_fraction, several
from atc_eval.files import read_json, write_json
from atc_eval.method import Method
from atc_eval.score.statistics import Draws, Estimate

RESULTS = "methods/*.json"
MERGING, PRUNING = ("atc", "tome", "kmedoids", "dpc_knn"), ("topk", "evit")
TOME_KEEPS = 0.5  # at least


@dataclass(frozen=True)
class Reductions:
    """Which methods are compared with the unreduced model."""

    _argument_group_name = "reductions of the tokens"
    method: list[str] = several([*MERGING, *PRUNING], "methods to compare", [*MERGING, *PRUNING])
    linkage: list[str] = several(["average", "complete", "single"], "linkages of atc", LINKAGES)
    keep: list[str] = several([], "percent kept at blocks 4, 7 and 10 (default: 25 50 70 90; none with --remove)")
    remove: list[int] = several(
        [], "tokens removed in every block; in the paper 16 for ViT-B, 8 for ViT-L, 7 for ViT-H"
    )
    schedule: list[str] = several(["constant", "linear"], "schedules of --remove", ["constant", "linear"])

    def __post_init__(self) -> None:
        for number in self.remove:
            check_number("--remove", number)
        self.methods()  # raises ValueError for percentages that do not fit

    def methods(self) -> list[Method]:
        """The unreduced model, and every method at every strength that it supports."""
        keeps = self.keep or ([] if self.remove else ["25", "50", "70", "90"])
        strengths: list[dict[str, Any]] = [{"r": parse_fraction(text)} for text in keeps]
        strengths += [{"t": number, "schedule": schedule} for number in self.remove for schedule in self.schedule]
        kinds: list[dict[str, Any]] = []
        for method in self.method:
            linkages = self.linkage if method == "atc" else ["average"]
            kinds += [{"method": method, "linkage": linkage} for linkage in linkages]
        configs = [
            ViTConfig(**kind, **strength)
            for kind, strength in product(kinds, strengths)
            if kind["method"] != "tome" or strength.get("r", 1) >= TOME_KEEPS
        ]
        return [Method(), *map(Method, configs)]


@dataclass(frozen=True, eq=False)
class Task:
    """A model and the images that it is tested on."""

    name: str
    model: VisionTransformer
    images: Dataset[Any]  # pairs of an image [3, H, W], as the model takes it, and its class
    subjects: NDArray[np.int64]  # [n], what each image shows; the bootstrap draws images of one subject together
    shown: list[int]  # indices of the images whose clusters are shown
    visible: Callable[[torch.Tensor], NDArray[np.floating[Any]]]  # makes an image visible, [H, W, 3] from 0 to 1


@dataclass(frozen=True, eq=False)
class Evaluation:
    """One method: whether each image was classified correctly, `[n]`, and its speed on one device."""

    method: Method
    correct: NDArray[np.bool_]
    images_per_second: float

    @property
    def accuracy(self) -> float:
        """Top-1 in percent."""
        return float(100 * self.correct.mean())


def evaluate(task: Task, method: Method, out: Path, batch_size: int, state: PartialState) -> Evaluation:
    """Classify all images, unless the file of an earlier run is there."""
    file = out / "methods" / f"{method.folder}.json"
    if not file.exists():
        correct, images_per_second = _classify(task, method, batch_size, state)
        if state.is_main_process:
            write_json(file, {"images_per_second": images_per_second, "correct": correct})
        state.wait_for_everyone()
    record = read_json(file)
    return Evaluation(method, np.array(record["correct"], bool), record["images_per_second"])


@torch.no_grad()
def _classify(task: Task, method: Method, batch_size: int, state: PartialState) -> tuple[list[int], float]:
    """For each image 1 if it is classified correctly, else 0; and images per second on one device."""
    numbers = range(state.process_index, len(task.subjects), state.num_processes)
    workers = 4 if state.device.type == "cuda" else 0
    loader = DataLoader(Subset(task.images, numbers), batch_size, num_workers=workers)
    model, correct, seconds = task.model.to(state.device), [], []
    with method.applied(model):
        for images, classes in tqdm(loader, desc="classifying", disable=not state.is_main_process, leave=False):
            images = images.to(state.device)
            start = time.perf_counter()
            predicted = model(images).argmax(dim=1).cpu()  # waits for the device
            seconds.append((time.perf_counter() - start) / len(images))
            correct += (predicted == classes).int().tolist()
    everyone = dict(gather_object(list(zip(numbers, correct, strict=True))))
    return [everyone[number] for number in range(len(task.subjects))], 1 / float(np.median(seconds))


def mean_by_subject(values: NDArray[Any], subjects: NDArray[np.int64], draws: Draws) -> Estimate:
    """The mean of `values` `[n]`, one per image, with a bootstrap over the subjects by `draws` `[B, S]`."""
    _, subject = np.unique(subjects, return_inverse=True)
    totals, counts = np.bincount(subject, values), np.bincount(subject)
    return Estimate.of(np.append(values.mean(), totals[draws].sum(axis=1) / counts[draws].sum(axis=1)))
