"""The laws of merging and copying back."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from atc_diffusion import MergeMap


@st.composite
def merge_maps(draw: st.DrawFn) -> MergeMap:
    """Labels `[B, N]` in which every one of K clusters occurs."""
    batch, num_clusters, extra = draw(st.integers(1, 3)), draw(st.integers(1, 8)), draw(st.integers(0, 12))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    rows = []
    for _ in range(batch):
        labels = torch.cat([torch.arange(num_clusters), torch.randint(num_clusters, (extra,), generator=generator)])
        rows.append(labels[torch.randperm(len(labels), generator=generator)])
    return MergeMap(torch.stack(rows), num_clusters)


def ones(merge_map: MergeMap, rows: int) -> torch.Tensor:
    return torch.randn(len(merge_map.labels), rows, 3, dtype=torch.float64)


@given(merge_maps())
def test_merge_undoes_unmerge(merge_map):
    y = ones(merge_map, merge_map.num_clusters)
    assert torch.allclose(merge_map.merge(merge_map.unmerge(y)), y, rtol=1e-14, atol=1e-14)


@given(merge_maps())
def test_merging_is_a_projection_onto_cluster_means(merge_map):
    x = ones(merge_map, merge_map.labels.shape[1])
    once = merge_map.unmerge(merge_map.merge(x))
    assert torch.allclose(merge_map.unmerge(merge_map.merge(once)), once, rtol=1e-14, atol=1e-14)
    for item, out, labels in zip(x, once, merge_map.labels, strict=True):
        for label in labels.unique():
            members = labels == label
            assert torch.allclose(out[members], item[members].mean(dim=0), rtol=1e-13, atol=1e-13)
            assert (out[members] == out[members][0]).all()


@given(merge_maps())
def test_sizes_count_and_weigh(merge_map):
    x = ones(merge_map, merge_map.labels.shape[1])
    counts = torch.stack([labels.bincount(minlength=merge_map.num_clusters) for labels in merge_map.labels])
    assert torch.equal(merge_map.sizes, counts)
    total = (merge_map.merge(x) * merge_map.sizes[:, :, None]).sum(dim=1)
    assert torch.allclose(total, x.sum(dim=1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_keeping_all_is_the_identity_and_one_cluster_the_mean(dtype):
    x = torch.randn(2, 7, 3).to(dtype)
    identity = MergeMap(torch.arange(7).repeat(2, 1), 7)
    assert torch.equal(identity.merge(x), x)
    assert torch.equal(identity.unmerge(x), x)
    mean = MergeMap(torch.zeros(2, 7, dtype=torch.int64), 1).merge(x)
    assert mean.dtype == dtype
    assert torch.allclose(mean[:, 0].float(), x.float().mean(dim=1), atol=4 * torch.finfo(dtype).eps)


def test_sums_of_float16_do_not_overflow():
    x = torch.full((1, 2, 1), 40000.0, dtype=torch.float16)
    assert MergeMap(torch.zeros(1, 2, dtype=torch.int64), 1).merge(x).item() == 40000


def test_tokens_may_have_no_channels():
    merge_map = MergeMap(torch.tensor([[0, 1, 0]]), 2)
    assert merge_map.unmerge(merge_map.merge(torch.zeros(1, 3, 0))).shape == (1, 3, 0)


def test_gradients_flow_through_both():
    merge_map = MergeMap(torch.tensor([[0, 1, 0, 2], [0, 0, 1, 2]]), 3)
    x = torch.randn(2, 4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: merge_map.unmerge(merge_map.merge(x)), x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_gradients_in_low_precision_count_every_token(dtype):
    """bfloat16 has no 1001; one rounding of the gradient is left."""
    x = torch.randn(1, 1001, 2, dtype=dtype, requires_grad=True)
    MergeMap(torch.zeros(1, 1001, dtype=torch.int64), 1).merge(x).sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad.double() * 1001, torch.ones(1, dtype=torch.float64), rtol=torch.finfo(dtype).eps)


@pytest.mark.parametrize(
    ("labels", "num_clusters", "message"),
    [
        (torch.zeros(3, dtype=torch.int64), 1, r"int64 tensor \[B, N\], got torch.int64 \[3\]"),
        (torch.zeros(1, 3), 1, "got torch.float32"),
        ([[0, 1]], 2, "got a list"),
        (torch.zeros(1, 3, dtype=torch.int64), 0, "num_clusters must be a whole number from 1 up, got 0"),
        (torch.zeros(1, 3, dtype=torch.int64), 3.0, "whole number from 1 up, got 3.0"),
        (torch.zeros(1, 3, dtype=torch.int64), None, "whole number from 1 up, got None"),
        (torch.tensor([[0, 1], [2, 0]]), 2, "labels of 2 clusters must be from 0 to 1, got 0 to 2"),
        (torch.tensor([[0, 1], [1, -1]]), 2, "labels of 2 clusters must be from 0 to 1, got -1 to 1"),
    ],
)
def test_bad_arguments_are_named(labels, num_clusters, message):
    with pytest.raises(ValueError, match=message):
        MergeMap(labels, num_clusters)


def test_tokens_of_another_number_are_refused():
    merge_map = MergeMap(torch.tensor([[0, 1, 0]]), 2)
    with pytest.raises(ValueError, match=r"expected a tensor \[1, 3, C\], got \[1, 4, 2\]"):
        merge_map.merge(torch.zeros(1, 4, 2))
    with pytest.raises(ValueError, match=r"expected a tensor \[1, 2, C\], got \[1, 3, 2\]"):
        merge_map.unmerge(torch.zeros(1, 3, 2))


def test_whole_numbers_have_no_means():
    with pytest.raises(ValueError, match=r"must be floating-point numbers .*, got torch.int64; pass x.float\(\)"):
        MergeMap(torch.tensor([[0, 1]]), 2).merge(torch.ones(1, 2, 3, dtype=torch.int64))
