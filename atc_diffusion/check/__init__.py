"""A check that any machine's owner can run: is merging right here, on every device, and does it pay?"""

from collections.abc import Iterator

import torch
from diffusers.utils import logging

from atc_diffusion.check.clusterings import check_clusterings
from atc_diffusion.check.finding import Finding
from atc_diffusion.check.networks import check_networks
from atc_diffusion.check.processors import check_processors
from atc_diffusion.check.report import devices_and_versions, verdict
from atc_diffusion.check.timings import check_speed
from atc_diffusion.devices import devices_found

__all__ = ["run_check"]


def run_check() -> int:
    """Print what was found, and a block to paste into an issue; 1 if something is wrong, else 0."""
    logging.set_verbosity_error()  # about precisions that are meant
    devices = devices_found()
    lines = devices_and_versions(devices)
    print("\n".join(lines), flush=True)
    findings = []
    for finding in _findings(devices):
        print(finding, flush=True)
        findings.append(finding)
    print(f"\n{verdict(findings)}\n\nPaste this into an issue:\n\n```")
    print("\n".join([*lines, *map(str, findings)]) + "\n```")
    return int(any(finding.problem for finding in findings))


def _findings(devices: list[torch.device]) -> Iterator[Finding]:
    for device in devices:
        yield from check_clusterings(device)
        yield from check_networks(device)
        yield from check_processors(device)
        yield from check_speed(device)
