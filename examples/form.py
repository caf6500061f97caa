"""The form of the page: ways of merging to choose from, and what is wrong with what was entered."""

import json
from collections.abc import Callable
from typing import Any

import gradio as gr

from atc_diffusion import ATCConfig, MergeConfig, ToMeConfig

Number = float | None
Problem = str | None


# What a visitor reads, the code of it, what that makes, and the fractions of queries and of keys to begin with.
PRESETS: dict[str, tuple[str, Callable[..., MergeConfig], tuple[float, float]]] = {
    "ATC, fast: every query, few keys": ("ATCConfig.fast", ATCConfig.fast, (1, 0.125)),
    "ATC, faster: skips steps, too": ("ATCConfig.faster", ATCConfig.faster, (1, 0.125)),
    "ATC, the default": ("ATCConfig", ATCConfig, (0.6, 0.6)),
    "ATC, the paper's Table 2": ("ATCConfig.paper", ATCConfig.paper, (0.6, 0.6)),
    "ToMe, the baseline": ("ToMeConfig", ToMeConfig, (0.5, 0.5)),
}
FIRST = next(iter(PRESETS))


def configure(preset: str, r: float, r_keys: float) -> tuple[MergeConfig, str]:
    """The configuration, and the code that merges like it.

    Raises:
        ValueError: where the preset cannot keep such fractions.
    """
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
        None if prompt.strip() else "Say what to draw, for example: red apple.",
        number_problem(seed, 0, 2**32 - 1, "Seed"),
        number_problem(steps, 1, 1000, "Steps"),
        number_problem(size, 16, 4096, "Size", multiple=8),
        None,
        fraction_problem(preset, r, r),
        fraction_problem(preset, 1, r_keys),
        None,
    ]
    return [gr.validate(problem is None, problem or "") for problem in problems]


def number_problem(value: Number, least: int, most: int, name: str, multiple: int = 1) -> Problem:
    kind = f"a multiple of {multiple}" if multiple > 1 else "a whole number"
    fits = value is not None and least <= value <= most and value % multiple == 0
    return None if fits else f"{name} must be {kind} from {least} to {most}."


def fraction_problem(preset: str, r: float, r_keys: float) -> Problem:
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
