"""The pipeline of an example; by default the small Stable Diffusion that ships in `examples/emoji_diffusion`."""

from pathlib import Path
from typing import Any

import torch

from atc_diffusion import load_pipeline

EMOJI = str(Path(__file__).parent / "emoji_diffusion")


def load(model: str) -> Any:
    """The pipeline of a hub id or folder, in float16 on a CUDA GPU and in float32 elsewhere."""
    device, dtype = ("cuda", torch.float16) if torch.cuda.is_available() else ("cpu", torch.float32)
    return load_pipeline(model, dtype).to(device)
