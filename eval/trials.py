"""Pictures drawn with one configuration after the other, and how they compare with the unmerged ones."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import pandas as pd
from configurations import Configuration
from generate import Sampler
from interleaved import warm_up
from pictures import Picture
from PIL import Image
from results import on_frontier
from scores import psnr, ssim
from tqdm import tqdm

TOGETHER = {  # what to add to the line that merges, by rival
    "steps": "  # and draw with num_inference_steps={strength:g}",
    "deepcache": """
deepcache = DeepCache.DeepCacheSDHelper(pipe=pipe)
deepcache.set_params(cache_interval={strength:g})
deepcache.enable()""",
}
DOUBT = 5.0  # dB that one picture may be from the mean of several
MEASURES = {"seconds": "median", "ratio": "median", "psnr": "mean", "ssim": "mean", "code": "first"}


@dataclass(frozen=True)
class Trial:
    """One picture, and the seconds it took."""

    configuration: Configuration
    picture: Picture
    image: Image.Image
    seconds: float


def measure(
    sampler: Sampler, configurations: Sequence[Configuration], pictures: Sequence[Picture], within: float
) -> list[Trial]:
    """Draw every picture with every configuration in turn that may still be the answer, until Ctrl-C.

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
                trials += try_to_draw(sampler, configuration, picture, bar)
            configurations = promising(compare(trials), configurations, within)
            bar.total = bar.n + len(configurations) * (len(pictures) - 1 - pictures.index(picture))
    except KeyboardInterrupt:
        if len(trials) < 2:
            raise
        bar.write("stopped; what follows is what was measured so far")
    finally:
        bar.close()
    return trials


def promising(results: pd.DataFrame, configurations: Sequence[Configuration], within: float) -> Sequence[Configuration]:
    """The unmerged model and what is not slower, nor far from being near enough; nothing if that is all."""
    good = results[(results["psnr"] >= within - DOUBT) & (results["ratio"] < 1)]
    names = set(zip(good["method"], good["setting"], strict=True))
    left = [each for each in configurations if (each.label, each.setting) in names]
    return [Configuration(), *left] if left else []


def try_to_draw(sampler: Sampler, configuration: Configuration, picture: Picture, bar: tqdm) -> list[Trial]:
    """The trial, or none if this way of drawing fails on this model or device; the unmerged model must not."""
    try:
        return [draw(sampler, configuration, picture)]
    except (RuntimeError, AttributeError, KeyError, ValueError) as error:
        if configuration.is_unmerged:
            raise
        bar.write(f"left out {configuration.label} ({configuration.setting}), which fails here: {error}")
        return []
    finally:
        bar.update()


def draw(sampler: Sampler, configuration: Configuration, picture: Picture) -> Trial:
    start = time.perf_counter()
    [image] = sampler.draw(configuration, [picture])
    return Trial(configuration, picture, image, time.perf_counter() - start)


def compare(trials: Sequence[Trial]) -> pd.DataFrame:
    """A row for every configuration, the fastest first: method, setting, pictures, seconds, ratio, psnr, ssim,
    code, frontier.

    `psnr` and `ssim` are to the unmerged picture, means over the prompts; seconds and ratio are medians.
    """
    unmerged = {trial.picture: trial for trial in trials if trial.configuration.is_unmerged}
    rows = pd.DataFrame([figures(trial, unmerged[trial.picture]) for trial in trials])
    how = {name: (name, by) for name, by in MEASURES.items()} | {"pictures": ("psnr", "size")}
    results = rows.groupby(["method", "setting"], sort=False).agg(**how).reset_index().sort_values("ratio")
    return results.assign(frontier=on_frontier(results["ratio"], results["psnr"]))


def figures(trial: Trial, unmerged: Trial) -> dict[str, object]:
    """One row of what `compare` aggregates."""
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
    """The lines that merge so, together with a rival where there is one; "" for a rival alone."""
    merge, rival = configuration.merge, configuration.rival
    if merge is None:
        return ""
    default = type(merge)()
    changed = [field.name for field in fields(merge) if getattr(merge, field.name) != getattr(default, field.name)]
    line = f"atc_diffusion.apply_patch(pipe, {', '.join(f'{name}={getattr(merge, name)!r}' for name in changed)})"
    return line if rival is None else line + TOGETHER[rival.name].format(strength=rival.strength)
