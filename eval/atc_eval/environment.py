"""The device and the versions that figures hold under."""

import platform
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import atc_diffusion

PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "torch-fidelity", "scipy")


@cache
def versions(packages: tuple[str, ...] = PACKAGES) -> dict[str, str]:
    """Versions of this package, with its commit, of Python, and of those `packages` that are installed."""
    found = {"atc_diffusion": f"{atc_diffusion.__version__} {commit()}".strip(), "python": platform.python_version()}
    for name in packages:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def commit() -> str:
    """The commit of this checkout, such as "(commit 1a2b3c4, changed)"; empty where there is none."""
    command = ["git", "describe", "--always", "--exclude", "*", "--dirty=, changed"]
    try:
        said = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return f"(commit {said.stdout.strip()})"


def in_words(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()} {device.type}, {torch.get_num_threads()} threads"
