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
    from report.setting import describe, write_files

PROMPTS = ("a photograph of a fox in the snow", "a bowl of fruit on a wooden table, oil painting")
EMOJI, EMOJI_PROMPTS, EMOJI_GUIDANCE = str(EMOJI_DIFFUSION), ("red apple", "penguin"), 3.0
DEFAULTS = {"model": EMOJI, "steps": 20, "guidance": None, "batch_size": 1}


@dataclass(frozen=True)
class Options:
    """The options of the command line."""

    sampling: Sampling
    prompt: tuple[str, ...] = option("what to draw (default: two prompts that suit the model)", ())
    image: Path | None = option("picture to start from, for image-to-image", None, checks.file)
    min_psnr: float = option("least PSNR to the unmerged picture, in dB", 40.0, float)
    max_seconds: float = option("begin no picture after that", float("inf"), float)
    seed: int = option("of the first picture", 0, int)
    json: Path | None = option("JSON file for the results", None, checks.file_to_write(".json"))
    html: Path | None = option("page for the results", None, checks.file_to_write(".html"))

    @property
    def prompts(self) -> tuple[str, ...]:
        return self.prompt or (EMOJI_PROMPTS if self.sampling.model == EMOJI else PROMPTS)

    @property
    def call(self) -> dict[str, Any]:
        """Arguments of `tune`, including those that it passes to the pipeline."""
        own = {"min_psnr": self.min_psnr, "max_seconds": self.max_seconds, "seed": self.seed}
        guidance = {"guidance_scale": EMOJI_GUIDANCE} if self.sampling.model == EMOJI else {}
        batch = {"num_inference_steps": self.sampling.steps, "num_images_per_prompt": self.sampling.batch_size}
        return own | batch | guidance | self.sampling.arguments


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(Options, __doc__, arguments, DEFAULTS)
    with door("tune.py", extra="tune", stopped="nothing was written"):
        device = PartialState(cpu=options.sampling.device == "cpu").device
        pipe, call = load_pipeline(options.sampling, device), options.call
        if options.image:
            pipe, call = from_picture(pipe, options.image, call)
        with tqdm(unit="picture") as bar:
            found = tune(pipe, options.prompts, on_progress=partial(show, bar), **call)
        print(found)
        write_files(found, describe(options.sampling, device, options.prompts), options.json, options.html)


def show(bar: tqdm, label: str, done: int, total: int) -> None:
    bar.total, bar.n = total, done
    bar.set_description(label)


if __name__ == "__main__":
    main()
