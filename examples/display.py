"""The form of the page, and what it shows of a run and of all runs of a visitor."""

import json
from collections.abc import Callable
from math import inf
from typing import Any
from uuid import uuid4

import gradio as gr
from PIL import Image

from atc_diffusion import ATCConfig, MergeConfig, ToMeConfig
from atc_diffusion.commands import number_problem
from atc_diffusion.painting import paint_clusters
from comparison import Comparison
from pipeline import at_step

Number = float | None
# By their names on the page: the code, what it makes, and the fractions of queries and of keys to begin with.
PRESETS: dict[str, tuple[str, Callable[..., MergeConfig], tuple[float, float]]] = {
    "ATC, fast: every query, few keys": ("ATCConfig.fast", ATCConfig.fast, (1, 0.125)),
    "ATC, faster: skips steps, too": ("ATCConfig.faster", ATCConfig.faster, (1, 0.125)),
    "ATC, the default": ("ATCConfig", ATCConfig, (0.6, 0.6)),
    "ATC, the paper's Table 2": ("ATCConfig.paper", ATCConfig.paper, (0.6, 0.6)),
    "ToMe, the baseline": ("ToMeConfig", ToMeConfig, (0.5, 0.5)),
}
FIRST = next(iter(PRESETS))
STEPS = (1, 1000)
SIZE = (16, 4096, 8)  # pixels: least, most, and what they are a multiple of


def configure(preset: str, r: float, r_keys: float) -> tuple[MergeConfig, str]:
    """The configuration, and the code that merges like it; ValueError where the preset cannot keep such fractions."""
    name, make, usual = PRESETS[preset]
    has_fractions = "fast" in name
    given = {"r": r} if r == r_keys and not has_fractions else {"r": r, "r_keys": r_keys}
    given = {} if has_fractions and (r, r_keys) == usual else given
    call = f"{name}({', '.join(f'{field}={value:g}' for field, value in given.items())})"
    imports = f"from atc_diffusion import {name.partition('.')[0]}, apply_patch"
    return make(**given), f"{imports}\n\napply_patch(pipe, {call})"


def check(prompt: str, seed: Number, steps: Number, size: Number, preset: str, r: float, r_keys: float, *_: Any) -> Any:
    """For each field, whether it will do, and the sentence to show beside it if not."""
    problems = [
        None if prompt.strip() else "Say what to draw, for example: red apple",
        number_problem("Seed", seed, 0, 2**32 - 1),
        number_problem("Steps", steps, *STEPS),
        number_problem("Size", size, *SIZE),
        None,
        fraction_problem(preset, r, r),
        fraction_problem(preset, 1, r_keys),
        None,
    ]
    return [gr.validate(problem is None, f"{problem}.") for problem in problems]


def fraction_problem(preset: str, r: float, r_keys: float) -> str | None:
    try:
        configure(preset, r, r_keys)
    except ValueError as error:
        return str(error)
    return None


def fields(prompt: str, steps: int, size: int) -> list[gr.components.Component]:
    """The fields, in the order in which `check` takes them."""
    words = gr.Textbox(prompt, label="Prompt", max_length=500, elem_id="prompt")
    with gr.Row():
        seed = gr.Number(0, label="Seed", min_width=80, elem_id="seed")
        number = gr.Number(steps, label="Steps", min_width=80, elem_id="steps")
        side = gr.Number(size, label="Size, pixels", min_width=80, elem_id="size")
    preset = gr.Dropdown(list(PRESETS), value=FIRST, label="Method", elem_id="preset")
    usual = {name: fractions for name, (_, _, fractions) in PRESETS.items()}
    r = gr.Slider(0.05, 1, usual[FIRST][0], step=0.025, label="Queries kept (r)", elem_id="r")
    r_keys = gr.Slider(0.05, 1, usual[FIRST][1], step=0.025, label="Keys and values kept (r_keys)", elem_id="r_keys")
    preset.input(None, preset, [r, r_keys], js=f"preset => ({json.dumps(usual)})[preset]")  # at once, in the browser
    return [words, seed, number, side, preset, r, r_keys]


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
    images = [(enlarge(run.merged), f"{run.settings.prompt}, {fidelity(run)}") for run in history]
    rows = []
    for run in history:
        given = run.settings
        figures = f"{run.unmerged_seconds:.2f}", f"{run.merged_seconds:.2f}", f"{run.psnr:.1f}", f"{run.ssim:.4f}"
        rows.append([given.prompt, given.seed, given.steps, given.size, *figures, given.code])
    return images, rows


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
