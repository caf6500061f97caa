"""What the page shows of a run, and of all runs of a visitor."""

from math import inf
from typing import Any
from uuid import uuid4

import gradio as gr
from PIL import Image

from atc_diffusion.painting import paint_clusters
from comparison import Comparison
from partitions import at_step

SIDE = 512  # pixels; smaller images are enlarged to this
TABLE = ["prompt", "seed", "steps", "size", "unmerged, s", "merged, s", "PSNR, dB", "SSIM", "code"]


def show(history: list[Comparison], index: int = 0) -> Any:
    """What the page shows of one run; nothing before the first."""
    if not history:
        return gr.skip()
    run = history[index]
    names = list(dict.fromkeys(partition.name for partition in run.partitions))
    name, last = (names[-1] if names else None), run.settings.steps - 1
    return [
        (enlarge(run.unmerged), enlarge(run.merged)),
        numbers(run),
        run.settings.code,
        "### No difference" if run.psnr == inf else f"### Absolute difference, {run.gain} times as strong",
        enlarge(run.difference, Image.Resampling.NEAREST),
        gr.Dropdown(names, value=name),
        gr.Slider(maximum=max(1, last), value=last),
        *clusters(history, index, name, last),
        index,
        *[gr.Column(visible=True)] * 2,
    ]


def select(history: list[Comparison], event: gr.SelectData) -> Any:
    return show(history, event.index)


def clusters(history: list[Comparison], index: int, name: str | None, step: int) -> tuple[str, Image.Image | None]:
    """A heading and an image of the clusters of one layer at one step."""
    if name is None:
        return "### Clusters: nothing was merged", None
    run = history[index]
    found = at_step([partition for partition in run.partitions if partition.name == name], step)
    heading = f"### {len(found.sizes)} clusters of {found.labels.size} tokens; the ten largest in colour"
    return heading, apart(paint_clusters(run.merged, found.labels, SIDE))


def past(history: list[Comparison]) -> tuple[list[tuple[Image.Image, str]], list[list[Any]]]:
    """The gallery of all runs, and the table of their settings and figures."""
    return [(enlarge(run.merged), f"{run.settings.prompt}, {fidelity(run)}") for run in history], [
        [
            run.settings.prompt,
            run.settings.seed,
            run.settings.steps,
            run.settings.size,
            f"{run.unmerged_seconds:.2f}",
            f"{run.merged_seconds:.2f}",
            f"{run.psnr:.1f}",
            f"{run.ssim:.4f}",
            run.settings.code,
        ]
        for run in history
    ]


def numbers(run: Comparison) -> str:
    """The figures of a run, as tiles."""
    tiles = {
        "unmerged": f"{run.unmerged_seconds:.2f} s",
        "merged": f"{run.merged_seconds:.2f} s",
        "of the time": f"{100 * run.ratio:.0f} %",
        "attention work saved": f"{100 * run.work_saved:.0f} %",
        "PSNR": fidelity(run),
        "SSIM": f"{run.ssim:.4f}",
    }
    cells = "".join(f"<div><b>{value}</b><span>{name}</span></div>" for name, value in tiles.items())
    return f'<div class="tiles">{cells}</div>'


def fidelity(run: Comparison) -> str:
    return "equal" if run.psnr == inf else f"{run.psnr:.1f} dB"


def enlarge(image: Image.Image, resample: Image.Resampling = Image.Resampling.BICUBIC) -> Image.Image:
    factor = max(1, SIDE // max(image.size))
    return apart(image.resize((image.width * factor, image.height * factor), resample))


def apart(image: Image.Image) -> Image.Image:
    """`image` with metadata of its own: Gradio names files by content, and rewrites one while a browser reads it."""
    image.info["id"] = uuid4().hex
    return image
