"""Time the clustering and a UNet step: python eval/speed.py [--size 512 1024] [--keep 60 40]

The UNet is Stable Diffusion v1.5's at full size with random weights, so its features are not those of images: the
clustering may take more or fewer rounds there. Ratios are of medians, taken in one run, the candidates taking turns.
"""

import argparse
import platform
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from importlib.metadata import version
from statistics import median
from typing import Any

import fastcluster
import numpy as np
import tomesd
import torch
from diffusers import UNet2DConditionModel
from scipy.cluster import hierarchy
from sklearn.cluster import AgglomerativeClustering
from torch import Tensor

from atc_diffusion import ATCConfig, agglomerate, patched

RUN = 2  # denoising steps timed together, so that a clustering can serve twice

Candidates = dict[str, Callable[[], Any]]


def take_turns(candidates: Candidates, repeats: int) -> dict[str, float]:
    """Median seconds of every candidate: the first runs once to warm up, then they alternate."""
    next(iter(candidates.values()))()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(repeats):
        for name, candidate in candidates.items():
            start = time.perf_counter()
            candidate()
            seconds[name].append(time.perf_counter() - start)
    return {name: median(times) for name, times in seconds.items()}


def condensed_distances(tokens: Tensor, linkage: str) -> np.ndarray:
    """What SciPy and fastcluster read: the upper triangle `[N (N - 1) / 2]` in float64."""
    x = tokens[0].double()
    if linkage == "ward":
        distances = torch.cdist(x, x)
    else:
        x = torch.nn.functional.normalize(x, dim=1)
        distances = 1 - x @ x.T
    rows, columns = torch.triu_indices(len(x), len(x), offset=1)
    return distances[rows, columns].numpy()


def partition(merges: np.ndarray, num_clusters: int) -> np.ndarray:
    return hierarchy.fcluster(merges, num_clusters, "maxclust")


def engines(tokens: Tensor, num_clusters: int, linkage: str) -> Candidates:
    """Exact clustering of `tokens` `[1, N, C]`, from tokens to labels `[N]`."""
    metric = "euclidean" if linkage == "ward" else "cosine"
    sklearn = AgglomerativeClustering(num_clusters, metric=metric, linkage=linkage)
    return {
        "atc_diffusion": lambda: agglomerate(tokens, num_clusters, linkage)[0].numpy(),
        "fastcluster": lambda: partition(
            fastcluster.linkage(condensed_distances(tokens, linkage), linkage, preserve_input=False), num_clusters
        ),
        "scipy": lambda: partition(hierarchy.linkage(condensed_distances(tokens, linkage), linkage), num_clusters),
        "scikit-learn": lambda: sklearn.fit_predict(tokens[0].numpy()),
    }


def same_partition(a: np.ndarray, b: np.ndarray) -> bool:
    pairs = np.unique(np.stack([a, b]), axis=1).shape[1]
    return pairs == len(np.unique(a)) == len(np.unique(b))


def time_clustering(num_tokens: int, keep: int, repeats: int) -> None:
    print(f"\n## One clustering of {num_tokens} x 320 Gaussian tokens to {keep} %, from tokens to labels\n")
    print("| linkage | engine | seconds | times ours | same partition |\n|---|---|---|---|---|")
    tokens = torch.randn(1, num_tokens, 320, generator=torch.Generator().manual_seed(0))
    for linkage in ("average", "complete", "single", "ward"):
        candidates = engines(tokens, round(num_tokens * keep / 100), linkage)
        labels = candidates["atc_diffusion"]()
        same = {name: same_partition(labels, candidate()) for name, candidate in candidates.items()}
        seconds = take_turns(candidates, repeats)
        for name, value in seconds.items():
            ratio = value / seconds["atc_diffusion"]
            print(f"| {linkage} | {name} | {value:.3f} | {ratio:.2f} | {'yes' if same[name] else 'no'} |", flush=True)


@contextmanager
def tomesd_patched(unet: UNet2DConditionModel, ratio: float) -> Any:
    tomesd.apply_patch(unet, ratio=ratio)
    try:
        yield
    finally:
        tomesd.remove_patch(unet)


def patches(unet: UNet2DConditionModel, keep: int) -> dict[str, Callable[[], AbstractContextManager[Any]]]:
    r = keep / 100
    configs = {
        f"ATC paper {keep} %": ATCConfig.paper(r),
        f"ATC {keep} %": ATCConfig(r=r),
        f"ATC keys/values {keep} %": ATCConfig(r=r, merge="keys_values"),
        f"ATC {keep} %, {RUN} steps a clustering": ATCConfig(r=r, refresh_every=RUN),
        f"ATC keys/values {keep} %, {RUN} steps a clustering": ATCConfig(r=r, merge="keys_values", refresh_every=RUN),
    }
    return {f"tomesd {keep} %": partial(tomesd_patched, unet, ratio=1 - r)} | {
        name: partial(patched, unet, config) for name, config in configs.items()
    }


@torch.inference_mode()
def time_step(unet: UNet2DConditionModel, size: int, keeps: list[int], repeats: int) -> None:
    print(f"\n## A step of Stable Diffusion v1.5's UNet, random weights, {size} x {size}, batch 2, float32\n")
    print(f"Mean of runs of {RUN} steps.\n\n| patch | seconds a step | ratio to unpatched |\n|---|---|---|")
    sample, text = torch.randn(2, 4, size // 8, size // 8), torch.randn(2, 77, 768)
    contexts = {"unpatched": nullcontext} | {k: v for keep in keeps for k, v in patches(unet, keep).items()}

    def run(context: Callable[[], AbstractContextManager[Any]]) -> None:
        with context():
            for timestep in range(RUN, 0, -1):
                unet(sample, timestep, text)

    seconds = take_turns({name: partial(run, context) for name, context in contexts.items()}, repeats)
    for name, value in seconds.items():
        print(f"| {name} | {value / RUN:.2f} | {value / seconds['unpatched']:.2f} |", flush=True)


def conditions() -> str:
    packages = ("torch", "diffusers", "scipy", "fastcluster", "scikit-learn", "tomesd")
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    return f"{torch.get_num_threads()} CPU threads ({platform.processor() or platform.machine()}); {versions}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, nargs="*", default=[512], help="pixels; 1024 takes minutes a step")
    parser.add_argument("--keep", type=int, nargs="+", default=[60, 40], help="percent of the tokens kept")
    parser.add_argument("--tokens", type=int, nargs="*", default=[4096], help="sizes of the clustering problems")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of every candidate")
    args = parser.parse_args()
    print(conditions())
    for num_tokens in args.tokens:
        time_clustering(num_tokens, args.keep[0], args.repeats)
    if args.size:
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768).eval().requires_grad_(False)
        for size in args.size:
            time_step(unet, size, args.keep, args.repeats)


if __name__ == "__main__":
    main()
