"""Find the setting that suits your model, picture size and machine.

    python eval/tune.py                                                       # the small model of this repository
    python eval/tune.py --model stable-diffusion-v1-5/stable-diffusion-v1-5 --size 1024 --within 40

Draws a few prompts unmerged, with merging of several strengths, with fewer steps, and with DeepCache if it is
installed, one picture of each in turn, and compares time and pictures. Ctrl-C stops early and reports what was
measured.
"""

import argparse
import json
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd
from accelerate import PartialState
from arguments import DEMO, add_device, positive
from configurations import Configuration
from generate import Sampler, device_name, load_pipeline, make_sampling, versions
from interleaved import warm_up
from page import Page, Section, Shown
from pictures import Picture, write_atomically
from PIL import Image
from plots import plot_fidelity
from results import on_frontier
from rivals import Rival
from scores import psnr, ssim
from tqdm import tqdm

from atc_diffusion import ATCConfig, patched

PROMPTS = ["a photograph of a fox in the snow", "a bowl of fruit on a wooden table, oil painting"]
DEMO_PROMPTS = ["red apple", "penguin"]
FASTER = 0.97  # of the unmerged time; anything nearer to 1 may be noise
TEXT = """\
Median seconds per picture, and the median ratio to the unmerged picture of the same prompt; PSNR and SSIM to that
picture, means over the prompts. A star marks the frontier: nothing else tried is both as fast and closer."""


@dataclass(frozen=True)
class Trial:
    """One picture, and the seconds it took."""

    configuration: Configuration
    picture: Picture
    image: Image.Image
    seconds: float


def main(arguments: Sequence[str] | None = None) -> None:
    try:
        run(parse(arguments))
    except (ValueError, OSError) as error:
        sys.exit(f"tune.py: {error}")
    except KeyboardInterrupt:
        sys.exit("tune.py: stopped before anything could be compared")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", help="hub id or folder of a text-to-image pipeline (default: the small model of this repository)")
    add("--prompt", nargs="+", help="what to draw (default: two prompts of our own)")
    add("--size", type=positive, help="height and width in pixels (default: the model's own)")
    add("--steps", type=positive, default=20, help="denoising steps (default: 20)")
    add("--guidance", type=float, help="classifier-free guidance scale (default: the pipeline's own)")
    add("--within", type=float, default=40.0, metavar="DB", help="least PSNR to the unmerged picture (default: 40)")
    add("--seed", type=int, default=0, help="of the first picture (default: 0)")
    add_device(parser)
    add("--json", type=Path, metavar="FILE", help="write the results there")
    add("--html", type=Path, metavar="FILE", help="write a page with the pictures there")
    parser.set_defaults(batch_size=1)
    args = parser.parse_args(arguments)
    if args.model is None:
        parser.set_defaults(model=DEMO["model"], prompt=DEMO_PROMPTS, guidance=DEMO["guidance"])
    return parser.parse_args(arguments)


def run(args: argparse.Namespace) -> None:
    state = PartialState(cpu=args.device == "cpu")
    sampling = make_sampling(args, state.device)
    sampler = Sampler(partial(load_pipeline, sampling, state.device), sampling, state)
    prompts = args.prompt or PROMPTS
    pictures = [Picture(number, 0, prompt, args.seed + number) for number, prompt in enumerate(prompts)]
    with patched(sampler.pipe, ATCConfig.fast()):
        pass  # a model that cannot be merged is refused before anything is drawn
    trials = measure(sampler, ladder(args.steps, is_unet=hasattr(sampler.pipe, "unet")), pictures)
    results = compare(trials)
    print(written(results).to_string(index=False))
    words, line = advice(results, args.within)
    print(f"\n{words}", *([f"\n    {line}"] if line else []), sep="\n")
    report(args, trials, results, device_name(state.device))


def ladder(steps: int, is_unet: bool) -> list[Configuration]:
    """The unmerged model, then what is tried, the most promising first."""
    fast = ATCConfig.fast()
    merges = [
        fast,
        ATCConfig.fast(0.25),
        ATCConfig(r=0.5, r_keys=0.1),
        ATCConfig.fast(0.05),
        ATCConfig(r=0.25, r_keys=0.1),
        *([replace(fast, max_downsample=8)] if is_unet else []),
    ]
    rivals = [Rival("steps", max(1, round(share * steps))) for share in (0.7, 0.5, 0.85)]
    ways = [Configuration(), *map(Configuration, merges), *(Configuration(rival=rival) for rival in rivals)]
    if is_unet and find_spec("DeepCache"):
        ways += [Configuration(rival=Rival("deepcache", 2)), Configuration(fast, Rival("deepcache", 2))]
    return list(dict.fromkeys(ways))


def measure(sampler: Sampler, configurations: Sequence[Configuration], pictures: Sequence[Picture]) -> list[Trial]:
    """Draw every picture with every configuration in turn, until Ctrl-C.

    Raises:
        KeyboardInterrupt: if it comes before there is anything to compare.
    """
    trials: list[Trial] = []
    bar = tqdm(total=len(pictures) * len(configurations), unit="picture")
    try:
        bar.set_description("warming up")
        warm_up(sampler, configurations, pictures[:1])
        for picture in pictures:
            for configuration in configurations:
                bar.set_description(f"{configuration.label} {configuration.setting}"[:40].strip())
                trials.append(draw(sampler, configuration, picture))
                bar.update()
    except KeyboardInterrupt:
        if len(trials) < 2:
            raise
        bar.write("stopped; what follows is what was measured so far")
    finally:
        bar.close()
    return trials


def draw(sampler: Sampler, configuration: Configuration, picture: Picture) -> Trial:
    start = time.perf_counter()
    [image] = sampler.draw(configuration, [picture])
    return Trial(configuration, picture, image, time.perf_counter() - start)


def compare(trials: Sequence[Trial]) -> pd.DataFrame:
    """A row for every configuration, the fastest first: method, setting, seconds, ratio, psnr, ssim, code, frontier.

    `psnr` and `ssim` are to the unmerged picture, means over the prompts; seconds and ratio are medians.
    """
    unmerged = {trial.picture: trial for trial in trials if trial.configuration.is_unmerged}
    rows = pd.DataFrame([_figures(trial, unmerged[trial.picture]) for trial in trials])
    how = {"seconds": "median", "ratio": "median", "psnr": "mean", "ssim": "mean", "code": "first"}
    results = rows.groupby(["method", "setting"], sort=False).agg(how).reset_index().sort_values("ratio")
    return results.assign(frontier=on_frontier(results["ratio"], results["psnr"]))


def _figures(trial: Trial, unmerged: Trial) -> dict[str, object]:
    images = [np.asarray(each.image.convert("RGB"), np.float64) for each in (trial, unmerged)]
    return {
        "method": trial.configuration.label,
        "setting": trial.configuration.setting,
        "seconds": trial.seconds,
        "ratio": trial.seconds / unmerged.seconds,
        "psnr": float("nan") if trial is unmerged else psnr(*images),
        "ssim": float("nan") if trial is unmerged else ssim(*images),
        "code": code(trial.configuration),
    }


def code(configuration: Configuration) -> str:
    """The line that merges so; "" for a rival alone."""
    merge = configuration.merge
    if merge is None:
        return ""
    default = type(merge)()
    changed = [field.name for field in fields(merge) if getattr(merge, field.name) != getattr(default, field.name)]
    return f"atc_diffusion.apply_patch(pipe, {', '.join(f'{name}={getattr(merge, name)!r}' for name in changed)})"


def advice(results: pd.DataFrame, within: float) -> tuple[str, str]:
    """What to do, in words, and the line of code to paste ("" where merging does not pay)."""
    good = results[(results["psnr"] >= within) & (results["ratio"] < FASTER)].sort_values("ratio")
    merging, rivals = good[good["code"] != ""], good[good["code"] == ""]
    rival = f" {_sentence(rivals.iloc[0])}." if len(rivals) else ""
    if not len(merging):
        return (
            f"Merging does not pay here: no setting within {within:g} dB is faster than the unmerged model.{rival}",
            "",
        )
    best = merging.iloc[0]
    ahead = f" Ahead of it without merging:{rival}" if len(rivals) and rivals.iloc[0]["ratio"] < best["ratio"] else ""
    return f"The fastest merging within {within:g} dB: {_sentence(best)}.{ahead}", best["code"]


def _sentence(row: pd.Series) -> str:
    return f"{row['method']} ({row['setting']}) takes {row['ratio']:.2f} of the time at {row['psnr']:.1f} dB"


def written(results: pd.DataFrame) -> pd.DataFrame:
    """`results` as a table of texts."""
    columns = {"seconds": ("s/picture", 2), "ratio": ("ratio", 2), "psnr": ("PSNR (dB)", 1), "ssim": ("SSIM", 3)}
    table = results[["method", "setting"]].copy()
    for column, (name, digits) in columns.items():
        table[name] = results[column].map(f"{{:.{digits}f}}".format, na_action="ignore").fillna("")
    return table.assign(frontier=results["frontier"].map({True: "*", False: ""}))


def report(args: argparse.Namespace, trials: Sequence[Trial], results: pd.DataFrame, device: str) -> None:
    """Write the JSON file and the page that were asked for."""
    width, height = trials[0].image.size
    conditions = {
        "model": Path(args.model).name if Path(args.model).is_dir() else args.model,
        "pictures": f"{len({trial.picture for trial in trials})} prompts, {width} x {height}, {args.steps} steps",
        "device": f"{device}, {args.dtype or 'default dtype'}",
        "versions": ", ".join(f"{name} {version}" for name, version in versions().items()),
    }
    if args.json:
        rows = json.loads(results.to_json(orient="records", double_precision=6))
        text = json.dumps({"conditions": conditions, "within": args.within, "results": rows}, indent=2)
        write_atomically(args.json, text.encode())
    if args.html:
        write_atomically(args.html, make_page(trials, results, conditions, args.within).html.encode())


def make_page(trials: Sequence[Trial], results: pd.DataFrame, conditions: dict[str, str], within: float) -> Page:
    words, line = advice(results, within)
    plot = plot_fidelity(results[results["psnr"].notna()])
    sections = [
        Section("What to use", words, code=line),
        Section("Time and fidelity", TEXT, table=written(results), figure=plot),
    ]
    for picture in dict.fromkeys(trial.picture for trial in trials):
        drawn = [trial for trial in trials if trial.picture == picture]
        shown = [Shown(_caption(trial, drawn[0]), trial.image) for trial in drawn]
        sections.append(Section(f'"{picture.prompt}", seed {picture.seed}', pictures=shown))
    return Page("Which setting?", conditions, [shlex.join(["python", *sys.argv])], sections)


def _caption(trial: Trial, unmerged: Trial) -> str:
    figures = _figures(trial, unmerged)
    if trial is unmerged:
        return f"unmerged: {trial.seconds:.2f} s"
    return f"{figures['method']} {figures['setting']}: {figures['ratio']:.2f} of the time, {figures['psnr']:.1f} dB"


if __name__ == "__main__":
    main()
