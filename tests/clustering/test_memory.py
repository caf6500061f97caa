"""With average and Ward linkage, a clustering on the CPU takes less memory than a matrix of all distances."""

import multiprocessing
import resource
import sys

import pytest
import torch

from atc_diffusion import agglomerate


def peak_bytes(num_tokens: int, channels: int, num_clusters: int, linkage: str) -> int:
    """Bytes by which one clustering raises the peak memory of a fresh process that holds the tokens."""
    # Forked from a small server: otherwise the process would inherit the peak of the one that starts it.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["atc_diffusion"])
    with context.Pool(1) as pool:
        return pool.apply(_growth_of_peak, (num_tokens, channels, num_clusters, linkage, torch.get_num_threads()))


def _growth_of_peak(num_tokens: int, channels: int, num_clusters: int, linkage: str, threads: int) -> int:
    torch.set_num_threads(threads)
    tokens = torch.randn(1, num_tokens, channels)
    agglomerate(tokens[:, :64], min(num_clusters, 32), linkage)  # loads everything that is loaded once
    before = _peak()
    agglomerate(tokens, num_clusters, linkage)
    return _peak() - before


def _peak() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@pytest.mark.slow
@pytest.mark.parametrize(("linkage", "needs_matrix"), [("complete", True), ("average", False), ("ward", False)])
def test_a_clustering_needs_no_matrix_where_the_linkage_lets_it(linkage: str, needs_matrix: bool) -> None:
    torch.ones(2**27)  # 512 MiB, more than the measured growth: what this process has held must not count
    assert (peak_bytes(4200, 8, 4199, linkage) > 4 * 4200**2) == needs_matrix
