"""Tables of the clustering alone: beside the other exact engines, on a GPU beside its floor, and as tokens grow."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

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
from benchmark.memory import peak_bytes
from benchmark.tables import Rows, Table, mebibytes
from benchmark.timing import Call, Timing, take_turns

CHANNELS = 320
LINKAGES = ("average", "complete", "single", "ward")
SMALL = (196, 256, 576, 1024)
CALLS = 10**6  # distances that are computed in one timing, at the least
MATRIX_FREE = ("average", "ward")
ENGINES = ("atc_diffusion", "fastcluster", "scipy", "scikit-learn")

# NVIDIA's data sheet of the H100 SXM, for dense products.
H100_TF32, H100_FP32, H100_BANDWIDTH = 495e12, 67e12, 3.35e12


def peers_table(num_tokens: int, keep: int, repeats: int) -> Table:
    """Clustering beside the other exact engines, which cluster one problem at a time on the CPU."""
    return Table(
        f"One clustering of {num_tokens} x {CHANNELS} Gaussian tokens to {keep} %",
        f"From tokens to labels, median of {repeats}; 'same': the partition is that of atc_diffusion.",
        ("linkage", "engine", "seconds", "times ours", "same"),
        [
            Rows(
                [(linkage, name) for name in ENGINES],
                partial(_beside_peers, num_tokens, clusters(num_tokens, keep), linkage, repeats),
            )
            for linkage in LINKAGES
        ],
    )


def small_table(keep: int, repeats: int) -> Table:
    """Small problems, as windows and vision transformers have them, beside the quickest of the other engines."""
    return Table(
        f"Small problems: one clustering, or 16 in a batch, of Gaussian tokens to {keep} %",
        "From tokens to labels; the other engines take one problem of a batch after the other. Milliseconds, "
        f"medians of {repeats} turns of several calls. Ratio: the quickest of {', '.join(ENGINES[1:])} to ours.",
        ("tokens", "linkage", "atc_diffusion", "quickest other", "ms", "ratio", "same"),
        [
            Rows(
                [(f"{batch} x {n} x {channels}", linkage)],
                partial(_beside_quickest, batch, n, channels, clusters(n, keep), linkage, repeats),
            )
            for batch in (1, 16)
            for n in SMALL
            for channels in (64, 384)
            for linkage in LINKAGES
        ],
    )


def _beside_quickest(
    batch: int, num_tokens: int, channels: int, num_clusters: int, linkage: str, repeats: int
) -> list[list[str]]:
    candidates = engines(gaussian(batch, num_tokens, channels), num_clusters, linkage)
    labels = candidates["atc_diffusion"]()
    same = all(
        same_partition(a, b) for candidate in candidates.values() for a, b in zip(labels, candidate(), strict=True)
    )
    calls = max(1, CALLS // (batch * num_tokens**2))
    timings = take_turns(candidates, repeats, "cpu", calls, warm_ups=0)
    ms = {name: 1000 * timing.seconds for name, timing in timings.items()}
    ours, quickest = ms.pop("atc_diffusion"), min(ms, key=lambda name: ms[name])
    times = ms[quickest] / ours
    return [[f"{ours:.2f}", quickest, f"{ms[quickest]:.2f}", f"{times:.1f}", "yes" if same else "no"]]


def _beside_peers(num_tokens: int, num_clusters: int, linkage: str, repeats: int) -> list[list[str]]:
    candidates = engines(gaussian(1, num_tokens), num_clusters, linkage)
    labels = candidates["atc_diffusion"]()
    same = {name: same_partition(labels[0], candidate()[0]) for name, candidate in candidates.items()}
    warm = take_turns(candidates, repeats, "cpu", warm_ups=0)  # the comparison was the warm-up
    seconds = {name: timing.seconds for name, timing in warm.items()}
    ours = seconds["atc_diffusion"]
    return [[f"{seconds[name]:.3f}", f"{seconds[name] / ours:.2f}", "yes" if same[name] else "no"] for name in ENGINES]


def engines(tokens: Tensor, num_clusters: int, linkage: str) -> dict[str, Call]:
    """Exact clustering of `tokens` `[B, N, C]`, from tokens to labels `[B, N]`."""
    metric = "euclidean" if linkage == "ward" else "cosine"
    sklearn = AgglomerativeClustering(num_clusters, metric=metric, linkage=linkage)
    others: dict[str, Callable[[Tensor], np.ndarray]] = {
        "fastcluster": lambda x: partition(
            fastcluster.linkage(condensed_distances(x, linkage), linkage, preserve_input=False), num_clusters
        ),
        "scipy": lambda x: partition(hierarchy.linkage(condensed_distances(x, linkage), linkage), num_clusters),
        "scikit-learn": lambda x: sklearn.fit_predict(x.numpy()),
    }
    ours: dict[str, Call] = {"atc_diffusion": lambda: agglomerate(tokens, num_clusters, linkage).numpy()}
    return ours | {name: partial(_one_by_one, cluster, tokens) for name, cluster in others.items()}


def _one_by_one(cluster: Callable[[Tensor], np.ndarray], tokens: Tensor) -> np.ndarray:
    return np.stack([cluster(item) for item in tokens])


def condensed_distances(tokens: Tensor, linkage: str) -> np.ndarray:
    """What SciPy and fastcluster read, of tokens `[N, C]`: the upper triangle `[N (N - 1) / 2]`, by one product."""
    if linkage == "ward":
        distances = torch.cdist(tokens, tokens)
    else:
        x = torch.nn.functional.normalize(tokens, dim=1)
        distances = 1 - x @ x.T
    return squareform(distances.numpy(), checks=False)


def partition(merges: np.ndarray, num_clusters: int) -> np.ndarray:
    """Labels of the clusters that the first merges leave."""
    num_tokens = len(merges) + 1
    first = merges[: num_tokens - num_clusters, :2].astype(np.int32)
    parents = np.repeat(np.arange(num_tokens, num_tokens + len(first)), 2)
    size = num_tokens + len(first)
    edges = coo_array((np.ones(2 * len(first)), (first.ravel(), parents)), (size, size))
    return connected_components(edges, directed=False)[1][:num_tokens]


def same_partition(a: np.ndarray, b: np.ndarray) -> bool:
    pairs = np.unique(np.stack([a, b]), axis=1).shape[1]
    return pairs == len(np.unique(a)) == len(np.unique(b))


def floor_table(sizes: Sequence[int], keep: int, repeats: int) -> Table:
    """Batched clustering on a GPU beside the least time that its arithmetic and memory traffic could take."""
    return Table(
        f"Clustering of batches of 2 x N x {CHANNELS} Gaussian tokens to {keep} %, float32, on a GPU",
        f"Milliseconds a batch, median of {repeats}. Floor: the longer of arithmetic and traffic. Average and Ward: "
        "2.3 N² C multiply-adds a problem, no matrix. Complete and single: N² C multiply-adds, and 4.5 N² float32 "
        "through memory. Arithmetic at the H100 SXM's dense 495 (TF32) or 67 (FP32) TFLOP/s; traffic at the device's "
        "own bandwidth where PyTorch tells it, else at the H100's 3.35 TB/s.",
        ("linkage", "N", "ms", "floor in TF32", "floor in FP32", "times the FP32 floor", "peak MiB"),
        [
            Rows([(linkage, str(n))], partial(_beside_floor, n, clusters(n, keep), linkage, repeats))
            for linkage in LINKAGES
            for n in sizes
        ],
    )


def _beside_floor(num_tokens: int, num_clusters: int, linkage: str, repeats: int) -> list[list[str]]:
    tokens = gaussian(2, num_tokens).cuda()
    cluster = partial(agglomerate, tokens, num_clusters, linkage)
    timing = take_turns({f"{linkage} {num_tokens}": cluster}, repeats, "cuda")[f"{linkage} {num_tokens}"]
    tf32, fp32 = (floor(num_tokens, linkage, rate, bandwidth()) for rate in (H100_TF32, H100_FP32))
    figures = [f"{1000 * seconds:.3f}" for seconds in (timing.seconds, tf32, fp32)]
    return [[*figures, f"{timing.seconds / fp32:.1f}", mebibytes(timing.peak)]]


def floor(num_tokens: int, linkage: str, rate: float, bandwidth: float, batch: int = 2) -> float:
    """Least seconds of a clustering, at `rate` operations (two a multiply-add) and `bandwidth` bytes a second."""
    products, matrices = (2.3, 0.0) if linkage in MATRIX_FREE else (1.0, 4.5)
    pairs = batch * num_tokens**2
    return max(2 * products * pairs * CHANNELS / rate, 4 * matrices * pairs / bandwidth)


def bandwidth() -> float:
    """Bytes a second of the GPU's memory."""
    gpu = torch.cuda.get_device_properties()
    kilohertz, bits = getattr(gpu, "memory_clock_rate", 0), getattr(gpu, "memory_bus_width", 0)
    return 2 * 1000 * kilohertz * bits / 8 or H100_BANDWIDTH


def growth_table(sizes: Sequence[int], keep: int, repeats: int, device: str) -> Table:
    """Time and memory of the linkages that need no matrix, as the tokens grow in number."""
    return Table(
        f"Growth: one clustering of N x {CHANNELS} Gaussian tokens to {keep} %, on {device}",
        f"Seconds: median of {repeats}. Exponent: of the time's growth since the size before. Peak: memory that the "
        "clustering takes beside the tokens, in a process of its own on a CPU (to a few MiB).",
        ("linkage", "N", "seconds", "exponent", "peak MiB", "N x N float32, MiB"),
        [
            Rows([(linkage, str(n)) for n in sizes], partial(_grow, sizes, keep, linkage, repeats, device))
            for linkage in MATRIX_FREE
        ],
    )


def _grow(sizes: Sequence[int], keep: int, linkage: str, repeats: int, device: str) -> list[list[str]]:
    timings = [_time_one(n, keep, linkage, repeats, device) for n in sizes]
    growth = [math.log(b.seconds / a.seconds) for a, b in pairwise(timings)]
    exponents = [f"{g / math.log(n / m):.2f}" for g, (m, n) in zip(growth, pairwise(sizes), strict=True)]
    return [
        [f"{timing.seconds:.3f}", exponent, mebibytes(timing.peak), mebibytes(4 * n**2)]
        for n, timing, exponent in zip(sizes, timings, ["", *exponents], strict=True)
    ]


def _time_one(num_tokens: int, keep: int, linkage: str, repeats: int, device: str) -> Timing:
    num_clusters = clusters(num_tokens, keep)
    tokens = gaussian(1, num_tokens).to(device)
    name = f"{linkage} {num_tokens}"
    timing = take_turns({name: partial(agglomerate, tokens, num_clusters, linkage)}, repeats, device)[name]
    if device == "cuda":
        return timing
    return Timing(timing.seconds, peak_bytes(num_tokens, CHANNELS, num_clusters, linkage))


def clusters(num_tokens: int, keep: int) -> int:
    return ATCConfig(r=keep / 100).num_kept(num_tokens, 1, None)[1]


def gaussian(batch: int, num_tokens: int, channels: int = CHANNELS) -> Tensor:
    return torch.randn(batch, num_tokens, channels, generator=torch.Generator().manual_seed(0))
