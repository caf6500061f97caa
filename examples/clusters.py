"""Show which tokens were merged: clusters over the drawn picture, by method and by share of tokens kept.

    python examples/clusters.py
    python examples/clusters.py --prompt "penguin" --keep 25 5 --at 0 10 19 --layers down_blocks.0 up_blocks.2

Writes a picture for each chosen layer and step, and beside it the histogram of its clusters' sizes. The methods differ
only in how they cluster: all compare keys over the whole picture, and all weigh a cluster by its size.
"""

import argparse
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from atc_diffusion import ATCConfig, DPCKNNConfig, KMedoidsConfig, MergeConfig, ToMeConfig, patched, summary
from atc_diffusion.clustering import LINKAGES
from door import door
from pipeline import EMOJI, load

with door("clusters.py", extra="app"):
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from overlay import Partition, at_step, paint, partitions, path

METHODS: dict[str, Callable[..., MergeConfig]] = {
    **{f"atc-{linkage}": partial(ATCConfig, linkage=linkage, window_size=None) for linkage in LINKAGES},
    "tome": partial(ToMeConfig, features="keys", proportional_attention=True),
    "kmedoids": KMedoidsConfig,
    "dpc-knn": DPCKNNConfig,
}


@dataclass(frozen=True)
class Run:
    """A picture and the clusters it was drawn with."""

    picture: Image.Image
    partitions: list[Partition]


Runs = dict[tuple[str, float], Run | str]  # by method and percent kept; a sentence where the method has no such share


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=EMOJI, help="hub id or folder of a diffusers pipeline")
    parser.add_argument("--prompt", default="sunflower")
    parser.add_argument("--method", nargs="+", choices=METHODS, default=list(METHODS), help="(default: all)")
    parser.add_argument("--keep", nargs="+", type=float, default=[25, 10, 3], help="percent of the tokens kept")
    parser.add_argument("--layers", nargs="+", help="layers to show, by parts of their names (default: first and last)")
    parser.add_argument("--at", nargs="+", type=int, help="steps to show, from 0 (default: the middle and the last)")
    parser.add_argument("--steps", type=int, default=20, help="denoising steps")
    parser.add_argument("--guidance", type=float, default=3.0, help="classifier-free guidance scale")
    parser.add_argument("--size", type=int, help="side in pixels (default: the model's)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/clusters"), help="folder for the pictures")
    args = parser.parse_args()
    args.at = args.at or [args.steps // 2, args.steps - 1]
    return args


def configurations(args: argparse.Namespace) -> dict[tuple[str, float], MergeConfig | str]:
    """By method and percent kept; a sentence where the method has no such share, which some method must have."""
    configs = {(method, keep): configure(method, keep) for method in args.method for keep in args.keep}
    for keep in args.keep:
        found = [configs[method, keep] for method in args.method]
        if not any(isinstance(config, MergeConfig) for config in found):
            raise ValueError(f"--keep {keep:g}: {found[0]}")
    return configs


def configure(method: str, keep: float) -> MergeConfig | str:
    try:
        return METHODS[method](r=keep / 100, record=True)
    except ValueError as error:
        return str(error)


def check(args: argparse.Namespace) -> None:
    """Refuse before anything is drawn what would fail later."""
    for keep in args.keep:
        if not 0 < keep < 100:
            raise ValueError(f"--keep is a percentage of tokens above 0 and below 100, got {keep:g}")
    if args.out.exists() and not args.out.is_dir():
        raise ValueError(f"--out {args.out} is a file; give a folder")
    if args.steps < 1:
        raise ValueError(f"--steps must be at least 1, got {args.steps}")
    for step in args.at:
        if not 0 <= step < args.steps:
            raise ValueError(f"--at counts the steps from 0 to {args.steps - 1}, got {step}")


def choose_layers(pipe: Any, parts: list[str] | None) -> list[str]:
    """Names of the layers that merge and contain one of the `parts`; without parts, the first and the last."""
    with patched(pipe, ATCConfig()):
        names = [path(layer.network, layer.name) for layer in summary(pipe).layers]
    chosen = [name for name in names if any(part in name for part in parts or [names[0], names[-1]])]
    if not chosen:
        raise ValueError(f"--layers {' '.join(parts or [])} fits none of {', '.join(names)}")
    return chosen


def draw(pipe: Any, args: argparse.Namespace, config: MergeConfig) -> Run:
    with patched(pipe, config):
        picture = pipe(
            args.prompt,
            height=args.size,
            width=args.size,
            num_inference_steps=args.steps,
            guidance_scale=args.guidance,
            generator=torch.Generator().manual_seed(args.seed),
        ).images[0]
        return Run(picture, partitions(pipe))


def overlays(runs: Runs, layer: str, step: int) -> Figure:
    """The clusters of one layer at one step: a row for each method, a column for each share, a picture before them."""
    methods, keeps = list(dict.fromkeys(method for method, _ in runs)), list(dict.fromkeys(keep for _, keep in runs))
    figure = Figure(figsize=(2.5 * len(keeps) + 2.8, 2.5 * len(methods) + 0.6), layout="constrained", dpi=100)
    figure.suptitle(f"{layer}, step {step}", fontsize="medium")
    grid = figure.subplots(len(methods), len(keeps) + 1, squeeze=False)
    for method, row in zip(methods, grid, strict=True):
        row[0].set_ylabel(method)
        show_picture(row[0], runs[method, keeps[0]])
        for axes, keep in zip(row[1:], keeps, strict=True):
            show_clusters(axes, runs[method, keep], layer, step)
    for axes, title in zip(
        grid[0], [f"drawn with {keeps[0]:g} %", *(f"{keep:g} % kept" for keep in keeps)], strict=True
    ):
        axes.set_title(title)
    return figure


def show_picture(axes: Axes, run: Run | str) -> None:
    show(axes, run if isinstance(run, str) else run.picture)


def show_clusters(axes: Axes, run: Run | str, layer: str, step: int) -> None:
    show(axes, run if isinstance(run, str) else paint(run.picture, clusters(run, layer, step).labels))


def show(axes: Axes, content: Image.Image | str) -> None:
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    if isinstance(content, str):
        axes.set_box_aspect(1)
        reason = textwrap.fill(content.partition(",")[0], 24)
        axes.text(0.5, 0.5, reason, ha="center", va="center", color="grey", fontsize="small")
    else:
        axes.imshow(content, interpolation="antialiased")


def histogram(runs: Runs, layer: str, step: int) -> Figure:
    """How many clusters of which size: a panel for each share, bins that double, a colour for each method."""
    keeps = list(dict.fromkeys(keep for _, keep in runs))
    figure = Figure(figsize=(3.4 * len(keeps) + 0.6, 3.4), layout="constrained", dpi=100)
    figure.suptitle(f"Cluster sizes: {layer}, step {step}", fontsize="medium")
    for axes, keep in zip(figure.subplots(1, len(keeps), squeeze=False)[0], keeps, strict=True):
        drawn = {method: run for (method, share), run in runs.items() if share == keep and isinstance(run, Run)}
        plot_sizes(axes, {method: clusters(run, layer, step).sizes for method, run in drawn.items()})
        axes.set(title=f"{keep:g} % kept", xlabel="tokens in the cluster", ylabel="clusters")
        axes.legend(fontsize="x-small")
    return figure


def plot_sizes(axes: Axes, sizes: dict[str, NDArray[np.int64]]) -> None:
    largest = max(int(of_method.max()) for of_method in sizes.values())
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.hist(list(sizes.values()), [2.0**power for power in range(largest.bit_length() + 1)], label=list(sizes))
    axes.set_ylim(bottom=0.7)  # a single cluster shows as a bar
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")


def clusters(run: Run, layer: str, step: int) -> Partition:
    return at_step([each for each in run.partitions if each.layer == layer], step)


def main() -> None:
    args = parse_arguments()
    check(args)
    configs = configurations(args)
    pipe = load(args.model)
    layers = choose_layers(pipe, args.layers)
    runs: Runs = {
        each: config if isinstance(config, str) else draw(pipe, args, config) for each, config in configs.items()
    }
    args.out.mkdir(parents=True, exist_ok=True)
    for layer in layers:
        for step in args.at:
            for kind, plot in {"clusters": overlays, "sizes": histogram}.items():
                path = args.out / f"{layer}_step{step}_{kind}.png"
                plot(runs, layer, step).savefig(path)
                print(f"wrote {path}")


if __name__ == "__main__":
    with door("clusters.py", extra="app"):
        main()
