"""Loads pipelines for the commands of this project, without the words of other libraries."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the log messages and progress bars of diffusers and transformers inside a `with` block."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    loggings = (diffusers_logging, transformers_logging)
    before = [(each.get_verbosity(), each.is_progress_bar_enabled()) for each in loggings]
    for each in loggings:
        each.set_verbosity_error()
        each.disable_progress_bar()
    try:
        yield
    finally:
        for each, (verbosity, shows_progress) in zip(loggings, before, strict=True):
            each.set_verbosity(verbosity)
            if shows_progress:
                each.enable_progress_bar()


def check_source(source: str | Path, kind: str) -> bool:
    """Whether `source` is a folder with a `kind`, and not its hub id; raises ValueError if it can be neither."""
    is_folder = bool(source) and Path(source).is_dir()
    if not is_folder and (isinstance(source, Path) or source.count("/") != 1 or source[0] in "/.~"):
        raise ValueError(f"there is no folder {source}; give a folder with a {kind}, or a hub id (owner/name)")
    return is_folder


def load_pipeline(model: str | Path, dtype: torch.dtype, *, safety_checker: bool = True) -> "DiffusionPipeline":
    """Load a diffusers pipeline to the CPU; neither loading nor calling it shows a progress bar.

    Args:
        model: folder of a pipeline, or its hub id.
        dtype: of its weights.
        safety_checker: load the network that blackens images, if the pipeline has one.

    Raises:
        ValueError: if there is no such pipeline, the hub cannot be reached, or `dtype` is none.
    """
    from diffusers import DiffusionPipeline

    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"dtype must be one of torch's, such as torch.float16, got {dtype!r}")

    is_local = check_source(model, "pipeline")
    options = {} if safety_checker else {"safety_checker": None, "requires_safety_checker": False}
    try:
        with quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # diffusers renames torch_dtype
            pipe = DiffusionPipeline.from_pretrained(model, torch_dtype=dtype, **options)
    except (OSError, ValueError) as error:
        first_line = str(error).partition("\n")[0]
        reason = first_line if is_local else f"the hub gave no such model; connect once and run: hf download {model}"
        raise ValueError(f"cannot load {model!r}: {reason}") from error
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load_lora(pipe: Any, lora: str) -> None:
    """Load a LoRA into a pipeline.

    Args:
        pipe: the pipeline.
        lora: folder of the LoRA's weights, or its hub id.

    Raises:
        ValueError: if there is no such LoRA, the hub cannot be reached, or the LoRA does not fit the pipeline.
    """
    is_local = check_source(lora, "LoRA")
    try:
        pipe.load_lora_weights(lora)
    except Exception as error:  # of a class that depends on the hub's client and its version
        reason = str(error).partition("\n")[0]
        hint = "" if is_local else f"; if it was never downloaded, connect once and run: hf download {lora}"
        raise ValueError(f"cannot load the LoRA {lora!r}: {reason}{hint}") from error


def make_scheduler(name: str, own: Any, **options: Any) -> Any:
    """A scheduler for a model that comes with another.

    Args:
        name: a scheduler class of diffusers.
        own: the scheduler that the model comes with.
        options: fields of the new scheduler's configuration; the others are those of `own`.

    Raises:
        ValueError: if it does not fit the model.
    """
    fitting = {each.__name__: each for each in (*own.compatibles, type(own))}
    if name not in fitting:
        raise ValueError(f"the scheduler {name} does not fit this model; these do: {', '.join(sorted(fitting))}")
    return fitting[name].from_config(own.config, **options)
