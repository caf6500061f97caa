"""The findings of `tune`, as a page and as rows of a JSON file."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from atc_diffusion import Tuning
from draw.experiment import this_command
from draw.pipeline import Sampling
from files import write_atomically, write_json
from machine import device_name, in_words, versions
from report.page import Page, Section, Shown
from report.plots import on_frontier, plot_fidelity

TEXT = """\
Median seconds per call, and the median ratio to the unmerged call for the same prompt; PSNR to its pictures, mean over
the prompts. Settings that were slower than the unmerged model, or far from its picture, were drawn for the first prompt
only. A star marks the frontier: nothing else tried is both as fast and closer."""


def describe(sampling: Sampling, device: torch.device, prompts: Sequence[str]) -> dict[str, str]:
    """The conditions that the figures hold under, in words."""
    return {
        "model": sampling.name,
        "prompts": ", ".join(prompts),
        "device": f"{device_name(device)}, {sampling.dtype_on(device)}",
        "versions": in_words(versions()),
    }


def write_files(found: Tuning, conditions: Mapping[str, str], json: Path | None, html: Path | None) -> None:
    if json:
        write_json(json, {"conditions": conditions, "min_psnr": found.min_psnr, "results": rows(found)})
    if html:
        write_atomically(html, make_page(found, conditions).html.encode())


def rows(found: Tuning) -> list[dict[str, Any]]:
    return [
        {
            "method": str(row.way),
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
    frame = frame.assign(setting="", frontier=on_frontier(frame["ratio"], frame["psnr"]))
    table = frame[["method", "pictures"]].copy()
    table["s/call"], table["ratio"] = frame["seconds"].map("{:.2f}".format), frame["ratio"].map("{:.2f}".format)
    stars = frame["frontier"].map({True: " *", False: ""})
    table["PSNR (dB)"] = frame["psnr"].map("{:.1f}".format, na_action="ignore").fillna("") + stars
    sections = [
        Section("What to use", code=found.advice),
        Section("Time and fidelity", TEXT, table=table, figure=plot_fidelity(frame[frame["psnr"].notna()])),
        Section("The first prompt", pictures=[Shown(str(row), row.image) for row in found.rows if row.image]),
    ]
    return Page("Which setting?", conditions, [this_command()], sections)
