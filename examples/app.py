"""A page that draws an image unmerged and merged, and shows what merging saves and what it costs.

    python examples/app.py
    python examples/app.py --model stable-diffusion-v1-5/stable-diffusion-v1-5 --guidance 7.5

It listens on this machine alone unless `--host` says otherwise, and sends nothing anywhere.
"""

import argparse
import os
import threading
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from atc_diffusion.commands import Several, check_finite, check_number, one_sentence
from pipeline import load, make_parser

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when Gradio is imported
with one_sentence("app.py", extra="app"):
    import gradio as gr

    import display
    from comparison import Comparison, Settings, Studio

MOST_RUNS = 24  # that a visitor's gallery holds

INTRODUCTION = """
# Token merging, before and after

Stable Diffusion's self-attention compares every token of an image with every other. Token merging clusters similar
tokens, computes with one per cluster and copies the result back to its members: less work, and nearly the same image.
It saves time where attention is a large part of a step, as in large images. Drag the handle, then draw your own.
"""
EXPLANATION = """
One run of each, after an untimed step; other work on this machine changes the seconds. The arithmetic saved is that of
the self-attentions that merge, clustering not counted. PSNR and SSIM measure how close the merged image is to the
unmerged one: higher is closer.
"""
PROMPTS = ["rainbow", "butterfly", "wrapped gift", "penguin", "sunflower", "red apple"]

THEME = gr.themes.Default(
    primary_hue="indigo",
    neutral_hue="slate",
    font=("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"),  # none is fetched
    font_mono=("ui-monospace", "SFMono-Regular", "Consolas", "monospace"),
)


class CancelledError(Exception):
    """The visitor does not want the image any more."""


class Runs:
    """Draws for every visitor of the page; each can cancel their own run."""

    def __init__(self, studio: Studio) -> None:
        self.studio = studio
        self._cancelled: dict[str | None, threading.Event] = {}

    def draw(
        self,
        prompt: str,
        seed: int,
        steps: int,
        size: int,
        preset: str,
        r: float,
        r_keys: float,
        history: list[Comparison],
        request: gr.Request,
        progress: gr.Progress = gr.Progress(),  # noqa: B008 - Gradio reads it from the signature
    ) -> list[Comparison]:
        """The visitor's runs with the new one first; unchanged if it was cancelled."""
        settings = Settings(prompt.strip(), seed, steps, size, *display.configure(preset, r, r_keys))
        cancelled = self._cancelled[request.session_hash] = threading.Event()
        try:
            comparison = self.studio.compare(settings, partial(_report, progress, cancelled, steps))
        except CancelledError:
            return history
        except Exception as error:
            raise gr.Error(f"This could not be drawn: {error}", duration=None) from error
        return [comparison, *history][:MOST_RUNS]

    def cancel(self, request: gr.Request) -> None:
        """End the visitor's run after the step it is in."""
        self._cancelled.pop(request.session_hash, threading.Event()).set()


def _report(progress: gr.Progress, cancelled: threading.Event, steps: int, name: str, done: int) -> None:
    if cancelled.is_set():
        raise CancelledError
    progress((done, steps), desc=f"{name} image", unit="steps")


def build(runs: Runs, prompts: list[str], example: Comparison) -> gr.Blocks:
    """The page, with an example on it; a visitor's runs are kept for as long as the tab is open."""
    steps = example.settings.steps
    with gr.Blocks(title="Token merging", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        history, index = gr.State([example]), gr.State(0)
        gr.Markdown(INTRODUCTION)
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                inputs = display.fields(prompts[0], steps, example.settings.size)
                with gr.Row():
                    start = gr.Button("Draw", variant="primary", min_width=100, elem_id="draw")
                    stop = gr.Button("Cancel", min_width=100, elem_id="cancel")
                gr.Examples(prompts, inputs[0], label="Prompts to try")
            with gr.Column(scale=3, min_width=300):
                images = gr.ImageSlider(
                    label="Unmerged | merged", format="png", max_height=display.SIDE, elem_id="images"
                )
                with gr.Column(visible=False) as summary:
                    figures = gr.HTML(padding=False)
                    code = gr.Code(
                        language="python", lines=3, wrap_lines=True, label="Code", buttons=["copy"], elem_id="code"
                    )
                    gr.Markdown(EXPLANATION, elem_classes="subdued")
        with gr.Column(visible=False) as details:
            with gr.Row():
                with gr.Column(min_width=300):
                    strength = gr.Markdown()
                    difference = image("difference")
                with gr.Column(min_width=300):
                    heading = gr.Markdown(elem_id="heading")
                    overlay = image("clusters")
                    layer = gr.Dropdown([], label="Layer", elem_id="layer")
                    step = gr.Slider(0, max(1, steps - 1), step=1, label="Step", elem_id="step")
            gr.Markdown("### Your runs\nClick an image to see it again.")
            gallery = gr.Gallery(
                label="Your runs",
                show_label=False,
                columns=6,
                fit_columns=False,
                allow_preview=False,
                format="png",
                buttons=["download_all"],
                elem_id="past",
            )
            table = gr.Dataframe(headers=display.TABLE, interactive=False, buttons=["copy"])

        shown = [images, figures, code, strength, difference, layer, step, heading, overlay, index, summary, details]
        overview = display.past, history, [gallery, table]
        drawing = start.click(
            runs.draw,
            [*inputs, history],
            history,
            validator=display.check,
            concurrency_limit=1,
            show_progress_on=images,
        )
        drawing.success(display.show, history, shown, show_progress="hidden").then(*overview)
        gallery.select(display.select, history, shown, show_progress="hidden")
        for chooser in (layer, step):
            chooser.input(display.clusters, [history, index, layer, step], [heading, overlay], show_progress="hidden")
        stop.click(runs.cancel, cancels=drawing, queue=False)
        page.unload(runs.cancel)
        page.load(display.show, history, shown, show_progress="hidden").then(*overview)
    return page


def image(name: str) -> gr.Image:
    return gr.Image(label=name, show_label=False, format="png", buttons=["download", "fullscreen"], elem_id=name)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    prompts = "prompts to offer; an example of the first is drawn at the start"
    parser.add_argument("--prompts", action=Several, default=PROMPTS, metavar="PROMPT", help=prompts)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine alone)")
    parser.add_argument("--port", type=int, help="port to listen on (default: the first free one from 7860)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_arguments(arguments)
    with one_sentence("app.py", extra="app"):
        check_number("--steps", args.steps, *display.STEPS)
        check_number("--size", args.size, *display.SIZE)
        check_number("--port", args.port, 1, 65535)
        check_finite("--guidance", args.guidance)
        serve(args)


def serve(args: argparse.Namespace) -> None:
    studio = Studio(load(args.model), guidance_scale=args.guidance)
    config, code = display.configure(display.FIRST, *display.PRESETS[display.FIRST][2])
    given = Settings(args.prompts[0], 0, args.steps, args.size or studio.size, config, code)
    print("Drawing an example ...", flush=True)
    page = build(Runs(studio), args.prompts, studio.compare(given, lambda name, done: None))
    page.launch(
        server_name=args.host,
        server_port=args.port,
        theme=THEME,
        css_paths=Path(__file__).with_name("app.css"),
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        quiet=True,
        prevent_thread_lock=True,
    )
    print(f"Open {page.local_url}", flush=True)
    page.block_thread()


if __name__ == "__main__":
    main()
