"""Find the setting that suits your model, picture size and machine.

    python eval/tune.py                                                       # the small model of this repository
    python eval/tune.py --model stable-diffusion-v1-5/stable-diffusion-v1-5 --size 1024 --min-psnr 40

Draws a few prompts unmerged, with merging of several strengths, with fewer steps, and with DeepCache if it is
installed, one picture of each in turn, and compares time and pictures. What is slow or far from the unmerged picture is
drawn for the first prompt only. Ctrl-C stops early and reports what was measured.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from arguments import checks
from arguments.door import door
from arguments.options import option, parse

with door("tune.py", extra="tune"):
    import pandas as pd
    from accelerate import PartialState

    from atc_diffusion import ATCConfig, patched
    from draw.candidates import candidates
    from draw.pictures import Picture
    from draw.pipeline import EMOJI_DIFFUSION, Sampling, device_name, versions
    from draw.sampler import Sampler
    from draw.trials import Trial, measure
    from files import write_atomically, write_json
    from report.advice import advice, as_rows, make_page, written
    from score.comparison import compare, promising

PROMPTS = ("a photograph of a fox in the snow", "a bowl of fruit on a wooden table, oil painting")
EMOJI = str(EMOJI_DIFFUSION)
EMOJI_PROMPTS = ("red apple", "penguin")
DEFAULTS = {"model": EMOJI, "steps": 20, "guidance": None, "batch_size": 1}


@dataclass(frozen=True)
class Tuning:
    """What the command line asks for."""

    sampling: Sampling
    prompt: tuple[str, ...] = option("what to draw (default: two prompts of our own)", ())
    min_psnr: float = option("least PSNR to the unmerged picture, in dB", 40.0, float)
    seed: int = option("of the first picture", 0, int)
    json: Path | None = option("write the results there", None, checks.file_to_write(".json"))
    html: Path | None = option("write a page with them there", None, checks.file_to_write(".html"))

    def pictures(self) -> list[Picture]:
        prompts = self.prompt or (EMOJI_PROMPTS if self.sampling.model == EMOJI else PROMPTS)
        return [Picture(number, 0, prompt, self.seed + number) for number, prompt in enumerate(prompts)]


def main(arguments: Sequence[str] | None = None) -> None:
    tuning = parse(Tuning, __doc__, arguments, DEFAULTS)
    with door("tune.py", extra="tune", stopped="nothing could be compared yet"):
        run(tuning)


def run(tuning: Tuning) -> None:
    sampling = tuning.sampling
    if sampling.model == EMOJI and sampling.guidance is None:
        sampling = replace(sampling, guidance=3.0)
    sampler = Sampler(sampling, PartialState(cpu=sampling.device == "cpu"))
    sampling.json(sampler.state.device)  # refuses a device that is not there
    with patched(sampler.pipe, ATCConfig.fast()):
        pass  # a model that cannot be merged is refused before anything is drawn
    ways = candidates(is_unet=hasattr(sampler.pipe, "unet"))
    trials = measure(sampler, ways, tuning.pictures(), partial(promising, min_psnr=tuning.min_psnr))
    results = compare(trials)
    print(written(results).to_string(index=False))
    print("", *advice(results, tuning.min_psnr), sep="\n")
    write(tuning, trials, results, conditions(sampler, trials))


def conditions(sampler: Sampler, trials: Sequence[Trial]) -> dict[str, str]:
    width, height = trials[0].image.size
    sampling = sampler.sampling
    return {
        "model": sampling.name,
        "pictures": f"{len({trial.picture for trial in trials})} prompts, {width} x {height}, {sampling.steps} steps",
        "device": f"{device_name(sampler.state.device)}, {sampling.dtype or 'default dtype'}",
        "versions": ", ".join(f"{name} {version}" for name, version in versions().items()),
    }


def write(tuning: Tuning, trials: Sequence[Trial], results: pd.DataFrame, conditions: dict[str, str]) -> None:
    """The JSON file and the page, as far as they were asked for."""
    if tuning.json:
        rows = as_rows(results)
        write_json(tuning.json, {"conditions": conditions, "min_psnr": tuning.min_psnr, "results": rows})
    if tuning.html:
        page = make_page(trials, results, conditions, tuning.min_psnr)
        write_atomically(tuning.html, page.html.encode())


if __name__ == "__main__":
    main()
