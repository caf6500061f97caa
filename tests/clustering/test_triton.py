"""Triton's backend without its kernels: what it refuses, what its check covers, and trees that need no data."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

import atc_diffusion.clustering as clustering
from atc_diffusion import ClusterTree, MergeMap, agglomerate, cluster_tree

pytest.importorskip("triton")
from atc_diffusion.clustering import _triton, placement


def test_the_self_check_launches_every_kernel_in_the_sizes_that_real_calls_use():
    alone, launched = placement.CHECKED_SIZES
    assert alone <= _triton.ALONE < 4 * _triton.TILE < launched


@pytest.mark.parametrize("function", [agglomerate, cluster_tree])
def test_what_it_cannot_do_is_said_at_once(function, monkeypatch):
    tokens = torch.zeros(1, 4, 3)
    with pytest.raises(ValueError, match=r"clusters in float32; use backend='torch' for torch.float64"):
        function(tokens.double(), backend="triton", num_clusters=2)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="needs tokens on a CUDA device, got cpu; use backend='torch'"):
        function(tokens, backend="triton", num_clusters=2)
    monkeypatch.setattr(clustering, "HAS_TRITON", False)
    with pytest.raises(ValueError, match="needs Triton; run `pip install triton` or use backend='torch'"):
        function(tokens, backend="triton", num_clusters=2)


def test_a_tree_is_ordered_cut_and_merged_by_without_knowing_its_data():
    """What needs no data to run needs no synchronisation with a device either."""
    with FakeTensorMode():
        parents = torch.arange(9).repeat(2, 1)
        tree = ClusterTree.from_merges(parents, torch.ones(2, 9), parents, num_clusters=3)
        merge_map = MergeMap(tree.cut(4), 4)
        assert merge_map.unmerge(merge_map.merge(torch.ones(2, 9, 5))).shape == (2, 9, 5)
