"""Find the setting that suits your model, picture size and machine.

    python eval/tune.py                                                       # the small model of this repository
    python eval/tune.py --model stable-diffusion-v1-5/stable-diffusion-v1-5 --size 1024 --within 40

Draws a few prompts unmerged, with merging of several strengths, with fewer steps, and with DeepCache if it is
installed, one picture of each in turn, and compares time and pictures. What is slow or far from the unmerged picture is
drawn for the first prompt only. Ctrl-C stops early and reports what was measured.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pandas as pd
from accelerate import PartialState
from arguments import DEMO, add_device, positive
from configurations import Configuration
from generate import Sampler, device_name, load_pipeline, make_sampling, versions
from page import Page, Section, Shown
from pictures import Picture, write_atomically
from plots import plot_fidelity
from rivals import Rival
from trials import Trial, compare, figures, measure

from atc_diffusion import ATCConfig, patched

PROMPTS = ["a photograph of a fox in the snow", "a bowl of fruit on a wooden table, oil painting"]
DEMO_PROMPTS = ["red apple", "penguin"]
FASTER = 0.97  # of the unmerged time; anything nearer to 1 may be noise
TEXT = """\
Median seconds per picture, and the median ratio to the unmerged picture of the same prompt; PSNR and SSIM to that
picture, means over the prompts. What was slower than the unmerged model or far from it was drawn for the first prompt
only. A star marks the frontier: nothing else tried is both as fast and closer."""


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
    trials = measure(sampler, ladder(args.steps, is_unet=hasattr(sampler.pipe, "unet")), pictures, args.within)
    results = compare(trials)
    print(written(results).to_string(index=False))
    print("", *advice(results, args.within), sep="\n")
    report(args, trials, results, device_name(state.device))


def ladder(steps: int, is_unet: bool) -> list[Configuration]:
    """The unmerged model, then what is tried, the most promising first."""
    fast = ATCConfig.fast()
    merges = [
        fast,
        ATCConfig.fast(0.25),
        replace(fast, r=0.5),
        ATCConfig.fast(0.05),
        *([replace(fast, max_downsample=8)] if is_unet else []),
    ]
    most_steps, *rivals = (Rival("steps", max(1, round(share * steps))) for share in (0.8, 0.7, 0.5))
    ways = [Configuration(), *map(Configuration, merges), Configuration(fast, most_steps)]
    ways += [Configuration(rival=rival) for rival in rivals]
    if is_unet and find_spec("DeepCache"):
        ways += [Configuration(rival=Rival("deepcache", 2)), Configuration(fast, Rival("deepcache", 2))]
    return list(dict.fromkeys(ways))


def advice(results: pd.DataFrame, within: float) -> tuple[str, str]:
    """What to do, in words, and the lines of code to paste ("" where merging does not pay)."""
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
    table = results[["method", "setting", "pictures"]].copy()
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
    words, lines = advice(results, within)
    plot = plot_fidelity(results[results["psnr"].notna()])
    sections = [
        Section("What to use", words, code=lines),
        Section("Time and fidelity", TEXT, table=written(results), figure=plot),
    ]
    for picture in dict.fromkeys(trial.picture for trial in trials):
        drawn = [trial for trial in trials if trial.picture == picture]
        shown = [Shown(_caption(trial, drawn[0]), trial.image) for trial in drawn]
        sections.append(Section(f'"{picture.prompt}", seed {picture.seed}', pictures=shown))
    return Page("Which setting?", conditions, [shlex.join(["python", *sys.argv])], sections)


def _caption(trial: Trial, unmerged: Trial) -> str:
    row = figures(trial, unmerged)
    if trial is unmerged:
        return f"unmerged: {trial.seconds:.2f} s"
    return f"{row['method']}, {row['setting']}: {row['ratio']:.2f} of the time, {row['psnr']:.1f} dB"


if __name__ == "__main__":
    main()
