"""Tables of the clustering alone: beside other exact engines, and as the tokens grow."""

import math
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import product

from atc_diffusion import agglomerate
from atc_diffusion.clustering import LINKAGES
from atc_eval.benchmark.engines import CHANNELS, OTHERS, OURS, engines, gaussian, num_kept, same_partition
from atc_eval.benchmark.markdown import Row, Table, mebibytes
from atc_eval.benchmark.memory import peak_bytes
from atc_eval.benchmark.turns import Timing, take_turns, time_alone

SMALL = (196, 256, 576, 1024)
DISTANCES = 10**6  # at least so many are computed in one timing of small problems
MATRIX_FREE = ("average", "ward")


def peers_table(num_tokens: int, keep: float, repeats: int) -> Table:
    return Table(
        f"One clustering of {num_tokens} x {CHANNELS} Gaussian tokens to {keep:.0%}",
        f"From tokens to labels, median of {repeats}; 'same': the partition is that of {OURS}.",
        ("linkage", "engine", "seconds", "times ours", "same"),
        _beside_peers(num_tokens, num_kept(num_tokens, keep), repeats),
    )


def _beside_peers(num_tokens: int, num_clusters: int, repeats: int) -> Iterator[Row]:
    tokens = gaussian(1, num_tokens)
    for linkage in LINKAGES:
        candidates = engines(tokens, num_clusters, linkage)
        labels = {name: cluster()[0] for name, cluster in candidates.items()}
        timings = take_turns(candidates, repeats, "cpu", warm_ups=0)
        for name, timing in timings.items():
            ratio = timing.seconds / timings[OURS].seconds
            same = "yes" if same_partition(labels[OURS], labels[name]) else "no"
            yield linkage, name, f"{timing.seconds:.3f}", f"{ratio:.2f}", same


def small_table(keep: float, repeats: int) -> Table:
    """Small problems, as in windows and vision transformers."""
    return Table(
        f"Small problems: one clustering, or 16 in a batch, of Gaussian tokens to {keep:.0%}",
        "From tokens to labels. The other engines cluster the problems of a batch one after the other. Milliseconds, "
        f"medians of {repeats} rounds of several calls. Ratio: the fastest of {', '.join(OTHERS)}, divided by ours.",
        ("tokens", "linkage", OURS, "quickest other", "ms", "ratio", "same"),
        _beside_quickest(keep, repeats),
    )


def _beside_quickest(keep: float, repeats: int) -> Iterator[Row]:
    for batch, num_tokens, channels, linkage in product((1, 16), SMALL, (64, 384), LINKAGES):
        candidates = engines(gaussian(batch, num_tokens, channels), num_kept(num_tokens, keep), linkage)
        labels = candidates[OURS]()
        others = (zip(labels, candidates[name](), strict=True) for name in OTHERS)
        same = all(same_partition(*pair) for pairs in others for pair in pairs)
        calls = max(1, DISTANCES // (batch * num_tokens**2))
        timings = take_turns(candidates, repeats, "cpu", calls, warm_ups=0)
        ms = {name: 1000 * timing.seconds for name, timing in timings.items()}
        quickest = min(OTHERS, key=ms.__getitem__)
        figures = f"{ms[OURS]:.2f}", quickest, f"{ms[quickest]:.2f}", f"{ms[quickest] / ms[OURS]:.1f}"
        yield f"{batch} x {num_tokens} x {channels}", linkage, *figures, "yes" if same else "no"


def growth_table(sizes: Sequence[int], keep: float, repeats: int, device: str) -> Table:
    return Table(
        f"Growth: one clustering of N x {CHANNELS} Gaussian tokens to {keep:.0%}, on {device}",
        f"Seconds: median of {repeats}. Exponent: growth of the time from one size to the next. Peak: memory of the "
        "clustering without the tokens; on a CPU, in a separate process (accurate to a few MiB).",
        ("linkage", "N", "seconds", "exponent", "peak MiB", "N x N float32, MiB"),
        _grow(sizes, keep, repeats, device),
    )


def _grow(sizes: Sequence[int], keep: float, repeats: int, device: str) -> Iterator[Row]:
    for linkage in LINKAGES if device == "cuda" else MATRIX_FREE:
        before: tuple[int, float] | None = None
        for n in sizes:
            timing = _time_one(n, keep, linkage, repeats, device)
            exponent = f"{math.log(timing.seconds / before[1], n / before[0]):.2f}" if before else ""
            yield linkage, str(n), f"{timing.seconds:.3f}", exponent, mebibytes(timing.peak), mebibytes(4 * n**2)
            before = n, timing.seconds


def _time_one(num_tokens: int, keep: float, linkage: str, repeats: int, device: str) -> Timing:
    num_clusters = num_kept(num_tokens, keep)
    cluster = partial(agglomerate, gaussian(1, num_tokens).to(device), num_clusters, linkage)
    timing = time_alone(f"{linkage} {num_tokens}", cluster, repeats, device)
    if device == "cuda":
        return timing
    return Timing(timing.seconds, peak_bytes(num_tokens, CHANNELS, num_clusters, linkage))
