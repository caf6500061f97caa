"""A table of the clustering alone, of Gaussian tokens, beside other exact engines."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import product

import fastcluster
import numpy as np
import torch
from scipy.cluster import hierarchy
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial.distance import squareform
from sklearn.cluster import AgglomerativeClustering
from torch import Tensor

from atc_diffusion import ATCConfig, agglomerate
from atc_diffusion.clustering import LINKAGES
from atc_eval.benchmark.timing import Call, Row, table, take_turns
from atc_eval.command_line import counted

CHANNELS = 320
OURS = "atc_diffusion"
OTHERS = ("fastcluster", "scipy", "scikit-learn")  # each clusters one problem at a time, on the CPU
SMALL = list(product((1, 16), (196, 256, 576, 1024), (64, 384)))  # as in windows and vision transformers
DISTANCES = 10**6  # at least so many are computed in one timing


def engines_table(title: str, shapes: Iterable[tuple[int, int, int]], keep: float, repeats: int) -> Iterator[str]:
    """Problems of `shapes` [B, N, C], beside the quickest of the other engines."""
    return table(
        f"{title}, of Gaussian tokens to {keep:.0%}",
        "From tokens to labels. The other engines cluster the problems of a batch one after the other. Milliseconds, "
        f"medians of {counted(repeats, 'round')} of several calls. Ratio: the fastest of {', '.join(OTHERS)}, divided "
        "by ours.",
        ("tokens", "linkage", OURS, "quickest other", "ms", "ratio", "same"),
        _beside_quickest(shapes, keep, repeats),
    )


def _beside_quickest(shapes: Iterable[tuple[int, int, int]], keep: float, repeats: int) -> Iterator[Row]:
    for (batch, num_tokens, channels), linkage in product(shapes, LINKAGES):
        _, num_clusters = ATCConfig(r=keep).num_kept(num_tokens, level=1, progress=None)
        candidates = engines(gaussian(batch, num_tokens, channels), num_clusters, linkage)
        labels = candidates[OURS]()
        same = all(same_partition(*pair) for name in OTHERS for pair in zip(labels, candidates[name](), strict=True))
        calls = max(1, DISTANCES // (batch * num_tokens**2))
        timings = take_turns(candidates, repeats, "cpu", calls, warm_ups=0)
        ms = {name: 1000 * timing.seconds for name, timing in timings.items()}
        quickest = min(OTHERS, key=ms.__getitem__)
        figures = f"{ms[OURS]:.2f}", quickest, f"{ms[quickest]:.2f}", f"{ms[quickest] / ms[OURS]:.1f}"
        yield f"{batch} x {num_tokens} x {channels}", linkage, *figures, "yes" if same else "no"


def engines(tokens: Tensor, num_clusters: int, linkage: str) -> dict[str, Call]:
    """Clustering of `tokens` `[B, N, C]` to labels `[B, N]` by each engine."""
    metric = "euclidean" if linkage == "ward" else "cosine"
    sklearn = AgglomerativeClustering(num_clusters, metric=metric, linkage=linkage)
    fast = partial(fastcluster.linkage, method=linkage, preserve_input=False)
    others: dict[str, Callable[[Tensor], np.ndarray]] = {
        "fastcluster": lambda x: cut(fast(condensed_distances(x, linkage)), num_clusters),
        "scipy": lambda x: cut(hierarchy.linkage(condensed_distances(x, linkage), linkage), num_clusters),
        "scikit-learn": lambda x: sklearn.fit_predict(x.numpy()),
    }
    ours: dict[str, Call] = {OURS: lambda: agglomerate(tokens, num_clusters, linkage).numpy()}
    return ours | {name: partial(_one_by_one, cluster, tokens) for name, cluster in others.items()}


def _one_by_one(cluster: Callable[[Tensor], np.ndarray], tokens: Tensor) -> np.ndarray:
    return np.stack([cluster(item) for item in tokens])


def condensed_distances(tokens: Tensor, linkage: str) -> np.ndarray:
    """Distances of tokens `[N, C]` as SciPy and fastcluster take them, `[N (N - 1) / 2]`, by one matrix product."""
    if linkage == "ward":
        distances = torch.cdist(tokens, tokens)
    else:
        x = torch.nn.functional.normalize(tokens, dim=1)
        distances = 1 - x @ x.T
    return squareform(distances.numpy(), checks=False)


def cut(merges: np.ndarray, num_clusters: int) -> np.ndarray:
    """Labels `[N]` after the first merges, which are replayed: SciPy's `fcluster` would dominate small problems."""
    num_tokens = len(merges) + 1
    first = merges[: num_tokens - num_clusters, :2].astype(np.int32)
    size = num_tokens + len(first)
    parents = np.repeat(np.arange(num_tokens, size), 2)
    edges = coo_array((np.ones(2 * len(first)), (first.ravel(), parents)), (size, size))
    return connected_components(edges, directed=False)[1][:num_tokens]


def same_partition(a: np.ndarray, b: np.ndarray) -> bool:
    pairs = np.unique(np.stack([a, b]), axis=1).shape[1]
    return pairs == len(np.unique(a)) == len(np.unique(b))


def gaussian(batch: int, num_tokens: int, channels: int = CHANNELS) -> Tensor:
    return torch.randn(batch, num_tokens, channels, generator=torch.Generator().manual_seed(0))
