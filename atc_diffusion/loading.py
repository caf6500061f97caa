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


def load_pipeline(model: str, dtype: torch.dtype, **options: Any) -> "DiffusionPipeline":
    """Load a diffusers pipeline to the CPU; neither loading nor calling it shows a progress bar.

    Args:
        model: folder of a pipeline, or its hub id.
        dtype: of its weights.
        options: further arguments of `DiffusionPipeline.from_pretrained`.

    Raises:
        ValueError: if there is no such pipeline, or the hub cannot be reached.
    """
    from diffusers import DiffusionPipeline

    is_local = Path(model).is_dir()
    if not is_local and (model.count("/") != 1 or model[0] in "/.~"):
        raise ValueError(f"there is no folder {model}; give a folder with a pipeline, or a hub id (owner/name)")
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
