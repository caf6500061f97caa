"""Draws and times sets of images with a diffusers pipeline: resumable, and divided between processes and jobs."""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline
from PIL import Image
from tqdm import tqdm

from atc_diffusion import ATCConfig, agglomerate
from atc_diffusion.clustering import on_compilation
from atc_eval.command_line import counted
from atc_eval.draw.images import PlannedImage
from atc_eval.draw.sampling import Sampling, load_pipeline
from atc_eval.draw.sets import ImageSet, Sets
from atc_eval.environment import device_name, versions
from atc_eval.files import read_json, write_json
from atc_eval.method import Method


@dataclass(eq=False)
class Sampler:
    """Draws this process's share of a part of the images.

    Every batch is full: the last one repeats an image. So an image depends only on its prompt, its seed and the
    settings, not on its neighbours, their order, interruptions or the number of processes.
    """

    sampling: Sampling
    state: PartialState
    part: slice = field(default_factory=lambda: slice(0, None, 1))

    @cached_property
    def pipe(self) -> DiffusionPipeline:
        """The pipeline, loaded when it is first needed."""
        return load_pipeline(self.sampling, self.state.device)

    def check(self, methods: Sequence[Method]) -> None:
        """Raises ValueError if the pipeline cannot be loaded, or a method does not fit it or the device."""
        for method in methods:
            if isinstance(method.config, ATCConfig) and method.config.backend:  # not called while patching
                agglomerate(torch.eye(4, device=self.state.device)[None], 2, backend=method.config.backend)
            with method.applied(self.pipe):
                pass

    def draw_missing(self, sets: dict[Method, ImageSet], missing: dict[Method, list[PlannedImage]]) -> None:
        """Draw the missing images of all sets, and write a record of the run beside them."""
        count = self.state.num_processes
        own = {method: images[self.state.process_index :: count] for method, images in missing.items()}
        self.state.wait_for_everyone()  # no process writes before all have listed the missing images
        total = sum(map(len, own.values()))
        title = "drawing" if count == 1 else f"drawing, process 1 of {count}"
        with tqdm(total=total, unit="image", desc=title, disable=not self.state.is_main_process) as bar:
            for method, images in own.items():
                self._draw_set(method, sets[method], images, bar)
        self.state.wait_for_everyone()

    def _draw_set(self, method: Method, images: ImageSet, own: list[PlannedImage], bar: tqdm) -> None:
        size, device = self.sampling.batch_size, self.state.device
        is_gpu = device.type == "cuda"
        if is_gpu:
            torch.cuda.reset_peak_memory_stats(device)
        for start in range(0, len(own), size):
            batch, begun = own[start : start + size], time.perf_counter()
            for image, drawn in zip(batch, self.draw(method, batch), strict=True):
                images.save(image, drawn)
            memory = torch.cuda.max_memory_allocated(device) if is_gpu else None
            record = {"peak_memory_bytes": memory, "device": device_name(device), "versions": versions()}
            number = self.part.start + self.part.step * self.state.process_index
            write_json(images.folder / f"record-{number}.json", record)
            if self.state.is_main_process and bar.n == 0:
                self._estimate(time.perf_counter() - begun, int(bar.total or 0) - len(batch), bar)
            bar.update(len(batch))

    def _estimate(self, seconds: float, left: int, bar: tqdm) -> None:
        """After the first batch, say how long the other images will take."""
        if left:
            hours = seconds / self.sampling.batch_size * left / 3600
            bar.write(
                f"The first batch took {seconds:.1f} s on {device_name(self.state.device)}; "
                f"at this rate this process takes {hours:.1f} hours for the other {counted(left, 'image')}."
            )
            sys.stdout.flush()  # a log is written in blocks

    def draw(self, method: Method, batch: Sequence[PlannedImage], steps: int | None = None) -> list[Image.Image]:
        """Draw each image from noise of its own seed, made on the CPU."""
        full = [*batch, *[batch[-1]] * (self.sampling.batch_size - len(batch))]
        with method.applied(self.pipe) as draw:
            output = draw(
                [image.prompt for image in full],
                num_inference_steps=steps or self.sampling.steps,
                generator=[torch.Generator().manual_seed(image.seed) for image in full],
                guidance_scale=self.sampling.guidance,
                height=self.sampling.size,
                width=self.sampling.size,
            )
        return list(output.images[: len(batch)])


def read_records(folder: Path) -> dict[str, Any]:
    """The records of all processes in `folder` as one: largest memory, devices, versions."""
    records = [read_json(path) for path in sorted(folder.glob("record-*.json"))]
    memory = [record["peak_memory_bytes"] for record in records if record["peak_memory_bytes"] is not None]
    return {
        "peak_memory_bytes": max(memory, default=None),
        "devices": sorted({record["device"] for record in records}),
        "versions": records[-1]["versions"] if records else versions(),
    }


class Times:
    """Rounds of one batch with each method, in a JSON file to which later runs add; keys are names of sets' folders."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rounds: list[dict[str, float]] = read_json(path) if path.exists() else []

    def of(self, sets: Sets) -> pd.DataFrame:
        """Seconds per image: a row for each round in which all `sets` were timed, a column for each."""
        return pd.DataFrame(self.rounds, columns=[each.folder.name for each in sets.values()]).dropna()

    def medians(self, sets: Sets) -> pd.DataFrame:
        """Median "seconds", and median "ratio" to the unmerged model in the same round, by folder's name."""
        times = self.of(sets)
        ratios = times.div(times[sets[Method()].folder.name], axis=0)
        return pd.DataFrame({"seconds": times.median(), "ratio": ratios.median()}).dropna()

    def measure(self, sampler: Sampler, sets: Sets, images: Sequence[PlannedImage], rounds: int) -> None:
        """Add rounds until so many have all `sets`; nothing else should be running."""
        missing = max(0, rounds - len(self.of(sets)))
        size = sampler.sampling.batch_size
        with tqdm(total=missing * len(sets), desc="timing", unit="batch", disable=not missing) as bar:
            for number in range(missing):
                batch = [images[(number * size + index) % len(images)] for index in range(size)]
                if number == 0:
                    warm_up(sampler, list(sets), batch, bar)
                times = {}
                for method, drawn in sets.items():
                    start = time.perf_counter()
                    sampler.draw(method, batch)
                    times[drawn.folder.name] = (time.perf_counter() - start) / size
                    bar.update()
                self.rounds.append(times)
                write_json(self.path, self.rounds)


def warm_up(sampler: Sampler, methods: Sequence[Method], batch: Sequence[PlannedImage], bar: tqdm) -> None:
    """Draw two steps with each method, so that everything is compiled and tuned."""
    with on_compilation(lambda: bar.set_description("compiling (once)")):
        for method in methods:
            bar.set_description("warming up")
            sampler.draw(method, batch, steps=2)
    bar.set_description("timing")
