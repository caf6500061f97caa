"""The words of the check."""

import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

import torch

from atc_diffusion.check.finding import Finding

PACKAGES = ("atc-diffusion", "torch", "diffusers", "transformers", "numba", "triton", "xformers")


def devices_and_versions(devices: Sequence[torch.device]) -> list[str]:
    versions = ", ".join(f"{package} {_version(package)}" for package in PACKAGES)
    system = f"Python {platform.python_version()}, {platform.platform()}, {torch.get_num_threads()} threads"
    return [system, versions, "devices: " + ", ".join(map(_name, devices))]


def verdict(findings: Sequence[Finding]) -> str:
    wrong = [finding.subject for finding in findings if finding.problem is not None]
    if not wrong:
        return f"Merging is right on this machine: {len(findings)} of {len(findings)} checks passed."
    return f"{len(wrong)} of {len(findings)} checks failed: {'; '.join(wrong)}. Please report this."


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _name(device: torch.device) -> str:
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)
