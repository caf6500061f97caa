"""Find the setting that suits your model, picture size and machine.

    python eval/tune.py                                                       # the small model of this repository
    python eval/tune.py --model stable-diffusion-v1-5/stable-diffusion-v1-5 --size 1024 --min-psnr 40

The command line of `atc_diffusion.tune`, with a page and a JSON file.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from arguments import checks
from arguments.door import door
from arguments.options import option, parse

with door("tune.py", extra="tune"):
    from accelerate import PartialState
    from tqdm import tqdm

    from atc_diffusion import tune
    from draw.pipeline import EMOJI_DIFFUSION, Sampling, from_picture, load_pipeline
    from files import write_atomically, write_json
    from report.setting import describe, make_page, rows

PROMPTS = ("a photograph of a fox in the snow", "a bowl of fruit on a wooden table, oil painting")
EMOJI_PROMPTS = ("red apple", "penguin")
EMOJI = str(EMOJI_DIFFUSION)
DEFAULTS = {"model": EMOJI, "steps": 20, "guidance": None, "batch_size": 1}


@dataclass(frozen=True)
class Options:
    """What the command line asks for."""

    sampling: Sampling
    prompt: tuple[str, ...] = option("what to draw (default: two prompts of our own)", ())
    image: Path | None = option("picture to start from, for image-to-image", None, checks.file)
    min_psnr: float = option("least PSNR to the unmerged picture, in dB", 40.0, float)
    max_seconds: float = option("begin no picture after that", float("inf"), float)
    seed: int = option("of the first picture", 0, int)
    json: Path | None = option("write the results there", None, checks.file_to_write(".json"))
    html: Path | None = option("write a page with them there", None, checks.file_to_write(".html"))

    @property
    def prompts(self) -> tuple[str, ...]:
        return self.prompt or (EMOJI_PROMPTS if self.sampling.model == EMOJI else PROMPTS)

    @property
    def call(self) -> dict[str, Any]:
        """Arguments for `tune`, of which it passes those that it does not know to the pipeline."""
        own = {"min_psnr": self.min_psnr, "max_seconds": self.max_seconds, "seed": self.seed}
        guidance = {"guidance_scale": 3.0} if self.sampling.model == EMOJI else {}
        batch = {"num_inference_steps": self.sampling.steps, "num_images_per_prompt": self.sampling.batch_size}
        return own | batch | guidance | self.sampling.arguments


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(Options, __doc__, arguments, DEFAULTS)
    with door("tune.py", extra="tune", stopped="nothing was written"):
        run(options)


def run(options: Options) -> None:
    state = PartialState(cpu=options.sampling.device == "cpu")
    pipe, call = load_pipeline(options.sampling, state.device), options.call
    if options.image:
        pipe, call = from_picture(pipe, options.image, call)
    with tqdm(unit="picture") as bar:
        found = tune(pipe, options.prompts, on_progress=partial(show, bar), **call)
    print(found)
    conditions = describe(options.sampling, state.device, options.prompts)
    if options.json:
        write_json(options.json, {"conditions": conditions, "min_psnr": options.min_psnr, "results": rows(found)})
    if options.html:
        write_atomically(options.html, make_page(found, conditions).html.encode())


def show(bar: tqdm, label: str, done: int, total: int) -> None:
    bar.total, bar.n = total, done
    bar.set_description(label)


if __name__ == "__main__":
    main()
