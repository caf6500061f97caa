"""Show which tokens were merged: the image, its ten largest clusters, and how large all of them are.

    python examples/clusters.py
    python examples/clusters.py --prompt penguin --method atc-ward tome --r 0.25 --at 0 10 19 --layers up_blocks.1

Writes an image for each chosen layer and step, with a row for each method. The methods differ only in how they cluster:
all compare keys over the whole image, and all weigh a cluster by its size.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from atc_diffusion import ATCConfig, DPCKNNConfig, KMedoidsConfig, MergeConfig, ToMeConfig, patched, summary
from atc_diffusion.clustering import LINKAGES
from atc_diffusion.commands import Several, check_folder, one_sentence
from pipeline import check_drawing, draw_images, load, make_parser

with one_sentence("clusters.py", extra="app"):
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from atc_diffusion.painting import paint_clusters
    from pipeline import Partition, at_step, partitions, path

METHODS: dict[str, Callable[..., MergeConfig]] = {
    **{f"atc-{linkage}": partial(ATCConfig, linkage=linkage, window_size=None) for linkage in LINKAGES},
    "tome": partial(ToMeConfig, features="keys", proportional_attention=True),
    "kmedoids": KMedoidsConfig,
    "dpc-knn": DPCKNNConfig,
}
Run = tuple[Image.Image, list[Partition]]  # an image, and the clusters it was drawn with


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--prompt", default="penguin", help="what to draw")
    parser.add_argument("--method", action=Several, choices=METHODS, default=["atc-average"], help="how tokens cluster")
    parser.add_argument("--r", type=float, default=0.02, help="fraction of the tokens kept, as in ATCConfig")
    parser.add_argument("--layers", action=Several, help="layers to show, by parts of their names (default: the last)")
    parser.add_argument(
        "--at", action=Several, type=int, help="steps to show, from 0 (default: that after a third of them)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the image")
    parser.add_argument("--out", type=Path, default=Path("out/clusters"), help="folder for the images")
    args = parser.parse_args(arguments)
    args.at = list(dict.fromkeys(args.at or [args.steps // 3]))
    return args


def check(args: argparse.Namespace) -> None:
    """Refuse before anything is drawn what would fail later."""
    check_folder("--out", args.out)
    check_drawing(args)
    if args.r == 1:
        raise ValueError("--r 1 keeps every token, so there are no clusters to show; give a smaller fraction")
    for step in args.at:
        if not 0 <= step < args.steps:
            raise ValueError(f"--at counts the steps from 0 to {args.steps - 1}, got {step}")


def choose_layers(pipe: Any, parts: list[str] | None) -> list[str]:
    """Names of the layers that merge and contain one of the `parts`; without parts, the last."""
    with patched(pipe, ATCConfig()):
        names = [path(layer.network, layer.name) for layer in summary(pipe).layers]
    chosen = [name for name in names if any(part in name for part in parts or [names[-1]])]
    if not chosen:
        raise ValueError(f"--layers {' '.join(parts or [])} fits none of {', '.join(names)}")
    return chosen


def draw(pipe: Any, args: argparse.Namespace, config: MergeConfig) -> Run:
    with patched(pipe, config):
        [image], _ = draw_images(pipe, [args.prompt], args.seed, args.size, args.steps, guidance_scale=args.guidance)
        found = partitions(pipe)
    if not found:
        raise ValueError(f"--r {args.r} merges no token of an image of this size; give a smaller fraction")
    return image, found


def plot(runs: Mapping[str, Run], layer: str, step: int) -> Figure:
    """A row for each method: the image, its largest clusters, and a histogram of all clusters' sizes."""
    figure = Figure(figsize=(8.3, 2.9 * len(runs)), layout="constrained", dpi=150)
    for row, (method, (image, found)) in zip(figure.subplots(len(runs), 3, squeeze=False), runs.items(), strict=True):
        clusters = at_step([each for each in found if each.layer == layer], step)
        show(row[0], image.resize((512, 512), Image.Resampling.BICUBIC), method)
        show(row[1], paint_clusters(image, clusters.labels), f"the ten largest of {len(clusters.sizes)} clusters")
        plot_sizes(row[2], clusters)
    return figure


def show(axes: Axes, image: Image.Image, title: str) -> None:
    axes.set(xticks=[], yticks=[])
    axes.set_title(title, fontsize=10)
    axes.spines[:].set_visible(False)
    axes.imshow(image)


def plot_sizes(axes: Axes, clusters: Partition) -> None:
    """Tokens by the size of their cluster, in bins that grow fourfold."""
    sizes = clusters.sizes
    edges = 4 ** np.arange((int(sizes.max()).bit_length() + 1) // 2 + 1)
    counts, _ = np.histogram(sizes, edges, weights=sizes)
    axes.bar(np.arange(len(counts)), counts, color="#c2255c")
    labels = [f"{low}-{high - 1}" for low, high in pairwise(edges)]
    axes.set_xticks(np.arange(len(counts)), labels, rotation=30, fontsize=8)
    axes.set_title(f"{clusters.labels.size} tokens by size of their cluster", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_box_aspect(1)


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_arguments(arguments)
    with one_sentence("clusters.py", extra="app"):
        check(args)
        configs = {method: METHODS[method](r=args.r, record=True) for method in args.method}
        pipe = load(args.model)
        layers = choose_layers(pipe, args.layers)
        runs = {method: draw(pipe, args, config) for method, config in configs.items()}
        args.out.mkdir(parents=True, exist_ok=True)
        for layer in layers:
            for step in args.at:
                path = args.out / f"{layer}_step{step}.png"
                plot(runs, layer, step).savefig(path)
                print(f"wrote {path}")


if __name__ == "__main__":
    main()
