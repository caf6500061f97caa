"""Loads pipelines for the commands of this project, without the words of other libraries."""

import warnings
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers


def load_pipeline(model: str, dtype: torch.dtype, **options: Any) -> Any:
    """A diffusers pipeline on the CPU; neither loading nor calling it shows a progress bar.

    Args:
        model: folder of a pipeline, or its hub id.
        dtype: of its weights.
        options: further arguments of `DiffusionPipeline.from_pretrained`.

    Raises:
        ValueError: if there is no such pipeline, or the hub cannot be reached.
    """
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    is_local = Path(model).is_dir()
    if not is_local and (model.count("/") != 1 or model[0] in "/.~"):
        raise ValueError(f"there is no folder {model}; give a folder with a pipeline, or a hub id (owner/name)")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # diffusers renames torch_dtype
            pipe = diffusers.DiffusionPipeline.from_pretrained(model, torch_dtype=dtype, **options)
    except (OSError, ValueError) as error:
        first_line = str(error).partition("\n")[0]
        reason = first_line if is_local else f"the hub gave no such model; connect once and run: hf download {model}"
        raise ValueError(f"cannot load {model!r}: {reason}") from error
    pipe.set_progress_bar_config(disable=True)
    return pipe
