"""The form of the page: ways of merging to choose from, and what is wrong with what was entered."""

import json
from dataclasses import replace
from typing import Any

import gradio as gr

from atc_diffusion import ATCConfig, MergeConfig, ToMeConfig

Number = float | None
Problem = str | None


PRESETS = {
    "ATC, the default": ATCConfig(),
    "ATC, fast: every query, few keys": ATCConfig.fast(),
    "ATC, faster: forecast steps too": ATCConfig.faster(),
    "ATC, the paper's Table 2": ATCConfig.paper(r=0.6),
    "ToMe, the baseline": ToMeConfig(r=0.5),
}
SHARES: dict[str, list[Any]] = {name: [config.r, config.r_keys or config.r] for name, config in PRESETS.items()}


def configure(preset: str, r: float, r_keys: float) -> MergeConfig:
    """Raises ValueError where the preset cannot keep such shares."""
    return replace(PRESETS[preset], r=r, r_keys=None if r_keys == r else r_keys)


def check(prompt: str, seed: Number, steps: Number, size: Number, preset: str, r: float, r_keys: float, *_: Any) -> Any:
    """For each field, whether it will do, and the sentence to show beside it if not."""
    problems = [
        None if prompt.strip() else "Say what to draw, for example: red apple.",
        number_problem(seed, 0, 2**32 - 1, "Seed"),
        number_problem(steps, 1, 1000, "Steps"),
        number_problem(size, 16, 4096, "Size", multiple=8),
        None,
        share_problem(preset, r, r),
        share_problem(preset, 1, r_keys),
        None,
    ]
    return [gr.validate(problem is None, problem or "") for problem in problems]


def number_problem(value: Number, least: int, most: int, name: str, multiple: int = 1) -> Problem:
    kind = f"a multiple of {multiple}" if multiple > 1 else "a whole number"
    fits = value is not None and least <= value <= most and value % multiple == 0
    return None if fits else f"{name} must be {kind} from {least} to {most}."


def share_problem(preset: str, r: float, r_keys: float) -> Problem:
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
    first = next(iter(PRESETS))
    preset = gr.Dropdown(list(PRESETS), value=first, label="Method", elem_id="preset")
    r = gr.Slider(0.05, 1, SHARES[first][0], step=0.025, label="Queries kept (r)", elem_id="r")
    r_keys = gr.Slider(0.05, 1, SHARES[first][1], step=0.025, label="Keys and values kept (r_keys)", elem_id="r_keys")
    preset.input(None, preset, [r, r_keys], js=f"preset => ({json.dumps(SHARES)})[preset]")  # at once, in the browser
    return [words, seed, number, side, preset, r, r_keys]
