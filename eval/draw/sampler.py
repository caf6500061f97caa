"""Draws sets of pictures with a diffusers pipeline: resumable, and divided between processes."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline
from PIL import Image
from tqdm import tqdm

from draw.configuration import Configuration
from draw.picture_set import PictureSet
from draw.pictures import Picture
from draw.pipeline import Sampling, load_pipeline
from files import read_json, write_json
from machine import device_name, versions


class Sampler:
    """Draws this process's share of the missing pictures.

    Every batch is full: the last one repeats a picture. So a picture depends only on its prompt, its seed and the
    settings, not on its neighbours, their order, interruptions or the number of processes.
    """

    def __init__(self, sampling: Sampling, state: PartialState) -> None:
        self.sampling = sampling
        self.state = state

    @cached_property
    def pipe(self) -> DiffusionPipeline:
        """The pipeline, loaded when it is first needed."""
        return load_pipeline(self.sampling, self.state.device)

    def complete(self, sets: dict[Configuration, PictureSet]) -> None:
        """Draw the missing pictures of all sets, and write a record of the run beside them.

        Raises:
            ValueError: if a configuration does not fit the pipeline, before anything is drawn.
        """
        if not any(pictures.missing() for pictures in sets.values()):
            return
        for configuration in sets:
            with configuration.applied(self.pipe):
                pass
        shares = {configuration: self._share(pictures) for configuration, pictures in sets.items()}
        self.state.wait_for_everyone()  # no process writes before all have listed the missing pictures
        total, count = sum(map(len, shares.values())), self.state.num_processes
        title = "generating" if count == 1 else f"generating, process 1 of {count}"
        with tqdm(total=total, unit="picture", desc=title, disable=not self.state.is_main_process) as bar:
            for configuration, share in shares.items():
                self._complete(configuration, sets[configuration], share, bar)
        self.state.wait_for_everyone()

    def _share(self, pictures: PictureSet) -> list[Picture]:
        with self.state.split_between_processes(pictures.missing()) as share:
            return list(share)

    def _complete(self, configuration: Configuration, pictures: PictureSet, share: list[Picture], bar: tqdm) -> None:
        size = self.sampling.batch_size
        if self.state.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.state.device)
        for start in range(0, len(share), size):
            batch = share[start : start + size]
            for picture, image in zip(batch, self.draw(configuration, batch), strict=True):
                pictures.save(picture, image)
            write_json(pictures.folder / f"record-{self.state.process_index}.json", self._record())
            bar.update(len(batch))

    def _record(self) -> dict[str, Any]:
        device = self.state.device
        memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
        return {"peak_memory_bytes": memory, "device": device_name(device), "versions": versions()}

    def draw(
        self, configuration: Configuration, batch: Sequence[Picture], steps: int | None = None
    ) -> list[Image.Image]:
        """Draw each picture from noise of its own seed, made on the CPU."""
        full = [*batch, *[batch[-1]] * (self.sampling.batch_size - len(batch))]
        with configuration.applied(self.pipe) as draw:
            output = draw(
                [picture.prompt for picture in full],
                num_inference_steps=steps or self.sampling.steps,
                generator=[torch.Generator().manual_seed(picture.seed) for picture in full],
                **self.sampling.arguments,
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
