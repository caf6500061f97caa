"""What `tune` found, as a page and as rows for a JSON file."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import pandas as pd
import torch

from atc_diffusion import Tuning
from draw.experiment import this_command
from draw.pipeline import Sampling, device_name, versions
from report.page import Page, Section, Shown
from report.plots import on_frontier, plot_fidelity

TEXT = """\
Median seconds per call, and the median ratio to the unmerged call for the same prompt; PSNR to its pictures, mean over
the prompts. What was slower than the unmerged model or far from it was drawn for the first prompt only. A star marks
the frontier: nothing else tried is both as fast and closer."""


def describe(sampling: Sampling, device: torch.device, prompts: Sequence[str]) -> dict[str, str]:
    """What the figures hold under, in words."""
    return {
        "model": sampling.name,
        "prompts": ", ".join(prompts),
        "device": f"{device_name(device)}, {sampling.dtype_on(device)}",
        "versions": ", ".join(f"{name} {version}" for name, version in versions().items()),
    }


def rows(found: Tuning) -> list[dict[str, Any]]:
    return [
        {
            "method": str(row.way),
            "setting": "",
            "seconds": row.seconds,
            "ratio": row.ratio,
            "psnr": row.psnr if row.psnr < float("inf") else None,
            "pictures": row.pictures,
            "config": row.way.config and asdict(row.way.config),
            "num_inference_steps": row.way.num_inference_steps,
        }
        for row in found.rows
    ]


def make_page(found: Tuning, conditions: Mapping[str, str]) -> Page:
    frame = pd.DataFrame(rows(found)).astype({"psnr": float})
    frame["frontier"] = on_frontier(frame["ratio"], frame["psnr"])
    shown = [Shown(str(row), row.image) for row in found.rows if row.image]
    sections = [
        Section("What to use", code=found.advice),
        Section("Time and fidelity", TEXT, table=_table(frame), figure=plot_fidelity(frame[frame["psnr"].notna()])),
        Section("The first prompt", pictures=shown),
    ]
    return Page("Which setting?", conditions, [this_command()], sections)


def _table(frame: pd.DataFrame) -> pd.DataFrame:
    """`frame` as texts."""
    columns = {"seconds": ("s/call", 2), "ratio": ("ratio", 2), "psnr": ("PSNR (dB)", 1)}
    table = frame[["method", "pictures"]].copy()
    for column, (name, digits) in columns.items():
        table[name] = frame[column].map(f"{{:.{digits}f}}".format, na_action="ignore").fillna("")
    return table.assign(frontier=frame["frontier"].map({True: "*", False: ""}))
