"""The device and the versions that figures hold under."""

import platform
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

import torch

import atc_diffusion

PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "torch-fidelity", "scipy")


def versions(packages: tuple[str, ...] = PACKAGES) -> dict[str, str]:
    """Versions of Python, of this package, and of those `packages` that are installed."""
    found = {"atc_diffusion": atc_diffusion.__version__, "python": platform.python_version()}
    for name in packages:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def in_words(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"
