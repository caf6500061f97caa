"""How images are sampled: the model, its scheduler, and everything else that changes the bits of an image."""

import hashlib
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from transformers.hf_argparser import HfArg

import atc_diffusion
from atc_diffusion.commands import check_finite, check_number
from atc_diffusion.loading import check_source, load_lora, make_scheduler

STABLE_DIFFUSION = "stable-diffusion-v1-5/stable-diffusion-v1-5"
EMOJI_DIFFUSION = Path(__file__).resolve().parents[3] / "examples" / "emoji_diffusion"
FULL_SIZE = 10**9  # bytes of weights; Stable Diffusion 1.5 has 2 to 5 times as many
# Karras spacing, which begins at the largest noise, would spend its steps there if that were (nearly) infinite.
KARRAS = {"use_karras_sigmas": True, "rescale_betas_zero_snr": False}
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-karras": ("EulerDiscreteScheduler", KARRAS),
    "euler-ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "dpm++": ("DPMSolverMultistepScheduler", {}),
    "dpm++-karras": ("DPMSolverMultistepScheduler", KARRAS),
    "dpm++-sde-karras": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"} | KARRAS),
}


@dataclass(frozen=True)
class Sampling:
    """The model, and how it is run."""

    _argument_group_name = "sampling"
    model: str = HfArg(default=STABLE_DIFFUSION, help="hub id or folder of a pipeline")
    lora: str | None = HfArg(default=None, help="hub id or folder of a LoRA for it")
    steps: int = HfArg(default=50, help="denoising steps")
    guidance: float = HfArg(default=7.5, help="classifier-free guidance scale")
    size: int | None = HfArg(default=None, help="height and width in pixels (default: the model's own)")
    scheduler: str | None = HfArg(default=None, metadata={"choices": list(SCHEDULERS)}, help="default: the model's own")
    batch_size: int = HfArg(default=8, help="prompts in a batch; it changes how images are rounded")
    dtype: Literal["float16", "bfloat16", "float32"] | None = HfArg(
        default=None, help="default: float16 on CUDA, else float32"
    )
    device: Literal["auto", "cpu", "cuda", "mps"] = HfArg(default="auto", help="auto: the fastest there is")

    def __post_init__(self) -> None:
        check_source(self.model, "pipeline")
        if self.lora:
            check_source(self.lora, "LoRA")
        check_number("--steps", self.steps)
        check_number("--size", self.size, least=8, multiple=8)
        check_number("--batch-size", self.batch_size)
        check_finite("--guidance", self.guidance)

    @property
    def name(self) -> str:
        """The model and its LoRA in a report."""
        names = [Path(each).name if Path(each).is_dir() else each for each in (self.model, self.lora) if each]
        return " with the LoRA ".join(names)

    @property
    def is_full_size(self) -> bool:
        """Whether the model is large, or is on the hub, where models are."""
        folder = Path(self.model)
        return not folder.is_dir() or sum(path.stat().st_size for path in weights_files(folder)) > FULL_SIZE

    def dtype_on(self, device: torch.device) -> str:
        return self.dtype or ("float16" if device.type == "cuda" else "float32")

    def json(self, device: torch.device) -> dict[str, Any]:
        """Everything that changes the bits of an image besides prompt, seed and merging.

        Batch size and number of CPU threads belong to it because they change how matrix products are rounded, and so
        which tokens are the most similar. A digest stands for the weights, which may be trained further.
        """
        if self.device not in ("auto", device.type):
            raise ValueError(f"--device {self.device}, but the device here is {device.type}")
        threads = torch.get_num_threads() if device.type == "cpu" else None
        found = {"dtype": self.dtype_on(device), "device": device.type, "threads": threads}
        weights = [weights_digest(source) for source in (self.model, self.lora) if source]
        return asdict(self) | {"weights": " + ".join(weights)} | found


def weights_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix in (".safetensors", ".bin"))


def weights_digest(model: str) -> str:
    """The first digits of the SHA-256 of the weights in the folder `model`; "hub" for a hub id."""
    if not Path(model).is_dir():
        return "hub"
    digest = hashlib.sha256()
    for path in weights_files(Path(model)):
        with path.open("rb") as file:
            for chunk in iter(partial(file.read, 2**20), b""):
                digest.update(chunk)
    return digest.hexdigest()[:16]


def load_pipeline(sampling: Sampling, device: torch.device) -> Any:
    """The pipeline of `sampling` on `device`, without a safety checker."""
    dtype = getattr(torch, sampling.dtype_on(device))
    pipe: Any = atc_diffusion.load_pipeline(sampling.model, dtype, safety_checker=False)
    if sampling.lora:
        load_lora(pipe, sampling.lora)
    if sampling.scheduler:
        name, options = SCHEDULERS[sampling.scheduler]
        pipe.scheduler = make_scheduler(name, pipe.scheduler, **options)
    return pipe.to(device)
