"""Load a pipeline quietly; by default the small Stable Diffusion that ships in `examples/emoji_diffusion`."""

from pathlib import Path
from typing import Any

import torch
import transformers
from diffusers import DiffusionPipeline
from diffusers.utils import logging

EMOJI = str(Path(__file__).parent / "emoji_diffusion")


def load(model: str) -> Any:
    """The pipeline of a hub id or folder, in float16 on a CUDA GPU and in float32 elsewhere.

    Raises:
        ValueError: if there is no such pipeline, or the hub cannot be reached.
    """
    if not Path(model).is_dir() and (model.count("/") != 1 or model[0] in "/.~"):
        raise ValueError(f"there is no folder {model}; give a folder with a pipeline, or a hub id (owner/name)")
    device, dtype = ("cuda", torch.float16) if torch.cuda.is_available() else ("cpu", torch.float32)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    transformers.logging.disable_progress_bar()
    try:
        pipe = DiffusionPipeline.from_pretrained(model)
    except OSError as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"cannot load {model!r}; give a folder with a pipeline, or go online ({reason})") from error
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device, dtype)
