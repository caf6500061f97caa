"""The form of the page: ways of merging to choose from, and what is wrong with what was entered."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gradio as gr

from atc_diffusion import ATCConfig, MergeConfig, ToMeConfig

Number = float | None
Problem = str | None


@dataclass(frozen=True)
class Preset:
    """A way of merging, with the shares it begins with; `r_keys` is None where keys are always merged like queries."""

    make: Callable[[float, float | None], MergeConfig]
    r: float
    r_keys: float | None = None


PRESETS = {
    "ATC, the default": Preset(lambda r, r_keys: ATCConfig(r=r, r_keys=r_keys), 0.6, 0.6),
    "ATC, fast: every query, few keys": Preset(lambda r, r_keys: ATCConfig(r=r, r_keys=r_keys, window=32), 1, 0.1),
    "ATC, the paper's Table 2": Preset(lambda r, _: ATCConfig.paper(r), 0.6),
    "ToMe, the baseline": Preset(lambda r, _: ToMeConfig(r=r), 0.5),
}


def configure(preset: str, r: float, r_keys: float) -> MergeConfig:
    """Raises ValueError where the preset cannot keep such shares."""
    return PRESETS[preset].make(r, None if r_keys == r else r_keys)


def check(
    prompt: str,
    seed: float | None,
    steps: float | None,
    size: float | None,
    preset: str,
    r: float,
    r_keys: float,
    *_: Any,
) -> list[dict[str, Any]]:
    """For each field, whether it will do, and a sentence to stand beside it if not."""
    problems = [
        None if prompt.strip() else "Say what to draw, for example: red apple.",
        number_problem(seed, 0, 2**32 - 1, "Seed"),
        number_problem(steps, 1, 1000, "Steps"),
        number_problem(size, 16, 4096, "Size", multiple=8),
        None,
        share_problem(preset, r, r_keys),
        None,
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
    name, first = next(iter(PRESETS.items()))
    preset = gr.Dropdown(list(PRESETS), value=name, label="Method", elem_id="preset")
    r = gr.Slider(0.05, 1, first.r, step=0.05, label="Queries kept (r)", elem_id="r")
    r_keys = gr.Slider(0.05, 1, first.r_keys, step=0.05, label="r_keys: share of keys, values kept", elem_id="r_keys")
    preset.input(begin, preset, [r, r_keys], show_progress="hidden")
    return [words, seed, number, side, preset, r, r_keys]


def begin(preset: str) -> tuple[gr.Slider, gr.Slider]:
    """The two shares as the preset begins."""
    chosen = PRESETS[preset]
    return gr.Slider(value=chosen.r), gr.Slider(value=chosen.r_keys or chosen.r, visible=chosen.r_keys is not None)
