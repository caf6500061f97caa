"""Generates sets of pictures with a diffusers pipeline: resumable, and divided between processes."""

import argparse
import hashlib
import json
import platform
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from accelerate import PartialState
from configurations import Configuration
from diffusers import DiffusionPipeline
from pictures import Picture, PictureSet, write_atomically
from PIL import Image
from tqdm import tqdm

import atc_diffusion

PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "torch-fidelity", "scipy")


@dataclass(frozen=True)
class Sampling:
    """What every set has in common: whatever changes the bits of a picture beside prompt, seed and merging.

    The batch size and the number of CPU threads are among them, for they decide how matrix products are rounded, and
    so, which tokens are the most similar. `weights` is the `weights_digest` of `model`, which may be trained further.
    `size` is the height and width in pixels. `guidance` and `size` None: the pipeline's own.
    """

    model: str
    weights: str
    steps: int
    guidance: float | None
    size: int | None
    batch_size: int
    dtype: str
    device: str
    threads: int | None = None

    @property
    def json(self) -> dict[str, Any]:
        return asdict(self)


def make_sampling(args: argparse.Namespace, device: torch.device, weights: str = "") -> Sampling:
    """The sampling that the command line asks for, on `device`.

    Raises:
        ValueError: if the command line asks for another device.
    """
    if args.device not in ("auto", device.type):
        raise ValueError(f"--device {args.device}, but the device here is {device.type}")
    return Sampling(
        model=args.model,
        weights=weights,
        steps=args.steps,
        guidance=args.guidance,
        size=args.size,
        batch_size=args.batch_size,
        dtype=args.dtype or ("float16" if device.type == "cuda" else "float32"),
        device=device.type,
        threads=torch.get_num_threads() if device.type == "cpu" else None,
    )


def weights_digest(model: str) -> str:
    """The first digits of a SHA-256 over the weights in the folder `model`; "hub" for a model of the hub."""
    if not Path(model).is_dir():
        return "hub"
    digest = hashlib.sha256()
    for path in sorted(path for path in Path(model).rglob("*") if path.suffix in (".safetensors", ".bin")):
        with path.open("rb") as file:
            for chunk in iter(partial(file.read, 2**20), b""):
                digest.update(chunk)
    return digest.hexdigest()[:16]


def load_pipeline(sampling: Sampling, device: torch.device) -> DiffusionPipeline:
    """The pipeline of `sampling.model` with its own scheduler and no safety checker, on `device`.

    Raises:
        ValueError: if the model is neither a folder with a pipeline nor to be had from the hub.
    """
    dtype = getattr(torch, sampling.dtype)
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # diffusers renames torch_dtype
            pipe = DiffusionPipeline.from_pretrained(
                sampling.model, torch_dtype=dtype, safety_checker=None, requires_safety_checker=False
            )
    except OSError as error:
        raise ValueError(
            f"cannot load the model {sampling.model!r}: it is no folder with a diffusers pipeline, and the hub gave "
            f"none; give --model FOLDER, or connect once and run: hf download {sampling.model}"
        ) from error
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


class Sampler:
    """Makes what is missing of the sets, this process's share of it.

    Every batch is full: the last one repeats a picture. So what a picture is depends on nothing but its prompt, its
    seed and the settings: not on its neighbours, on the order, on interruptions or on how many processes share.
    """

    def __init__(self, load: Callable[[], DiffusionPipeline], sampling: Sampling, state: PartialState) -> None:
        self.load = load
        self.sampling = sampling
        self.state = state

    @cached_property
    def pipe(self) -> DiffusionPipeline:
        """The pipeline, loaded when it is first needed."""
        return self.load()

    def run(self, sets: dict[Configuration, PictureSet]) -> None:
        """Complete all sets, with a record of what made them beside the pictures.

        Raises:
            ValueError: if a configuration does not fit the pipeline; nothing is drawn then.
        """
        for configuration in sets:
            with configuration.applied(self.pipe):
                pass
        shares = {configuration: self._share(pictures) for configuration, pictures in sets.items()}
        self.state.wait_for_everyone()  # nobody writes before everybody has seen what is missing
        with tqdm(total=sum(map(len, shares.values())), unit="picture", desc=self._title, disable=self._quiet) as bar:
            for configuration, share in shares.items():
                self._complete(configuration, sets[configuration], share, bar)
        self.state.wait_for_everyone()

    @property
    def _title(self) -> str:
        count = self.state.num_processes
        return "generating" if count == 1 else f"generating, process 1 of {count}"

    @property
    def _quiet(self) -> bool:
        return not self.state.is_main_process

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
            record = pictures.folder / f"record-{self.state.process_index}.json"
            write_atomically(record, json.dumps(self._record(), indent=2).encode())
            bar.update(len(batch))

    def _record(self) -> dict[str, Any]:
        device = self.state.device
        memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
        return {"peak_memory_bytes": memory, "device": device_name(device), "versions": versions()}

    def draw(
        self, configuration: Configuration, batch: Sequence[Picture], steps: int | None = None
    ) -> list[Image.Image]:
        """Draw one picture for every prompt, each from noise of its own seed, drawn on the CPU."""
        full = [*batch, *[batch[-1]] * (self.sampling.batch_size - len(batch))]
        size, guidance = self.sampling.size, self.sampling.guidance
        with configuration.applied(self.pipe) as draw:
            output = draw(
                [picture.prompt for picture in full],
                num_inference_steps=steps or self.sampling.steps,
                generator=[torch.Generator().manual_seed(picture.seed) for picture in full],
                **({} if size is None else {"height": size, "width": size}),
                **({} if guidance is None else {"guidance_scale": guidance}),
            )
        return list(output.images[: len(batch)])


def read_records(folder: Path) -> dict[str, Any]:
    """What all processes recorded in `folder`, as one: largest memory, devices, versions."""
    records = [json.loads(path.read_text()) for path in sorted(folder.glob("record-*.json"))]
    memory = [record["peak_memory_bytes"] for record in records if record["peak_memory_bytes"] is not None]
    return {
        "peak_memory_bytes": max(memory, default=None),
        "devices": sorted({record["device"] for record in records}),
        "versions": records[-1]["versions"] if records else versions(),
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that make and score the pictures."""
    packages = {name: version(name) for name in PACKAGES}
    return {"atc_diffusion": atc_diffusion.__version__, "python": platform.python_version()} | packages


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"
