"""The baseline, against tomesd."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tomesd.merge import bipartite_soft_matching_random2d
from torch import Tensor

from atc_diffusion import ToMeConfig, bipartite_labels
from atc_diffusion.clustering.baselines import draw_destinations


def tomesd_partition(tokens: Tensor, height: int, width: int, stride: int, num_clusters: int) -> Tensor:
    """Which tokens tomesd joins, `[B, N, N]`: those that come back equal after merging token numbers."""
    merge, unmerge = bipartite_soft_matching_random2d(
        tokens, width, height, stride, stride, height * width - num_clusters, no_rand=True
    )
    numbers = torch.arange(height * width, dtype=torch.float64).expand(len(tokens), -1)[:, :, None]
    representatives = unmerge(merge(numbers, mode="amax"))[:, :, 0]
    return representatives[:, :, None] == representatives[:, None, :]


@given(st.integers(0, 2**32 - 1), st.integers(2, 9), st.integers(2, 9), st.integers(2, 3), st.floats(0, 1))
def test_partitions_equal_tomesds_for_equal_destinations(seed, height, width, stride, fraction):
    if stride > min(height, width):
        return
    tokens = torch.randn(2, height * width, 4, generator=torch.Generator().manual_seed(seed))
    corners = (torch.arange(height // stride) * stride)[:, None] * width + torch.arange(width // stride) * stride
    destinations = corners.flatten()
    num_clusters = len(destinations) + round(fraction * (height * width - len(destinations)))
    labels = bipartite_labels(tokens, num_clusters, destinations)
    assert (labels.amax(dim=1) == num_clusters - 1).all()
    expected = tomesd_partition(tokens, height, width, stride, num_clusters)
    if num_clusters < height * width:  # tomesd returns the identity where nothing is merged
        assert torch.equal(labels[:, :, None] == labels[:, None, :], expected)


@pytest.mark.parametrize(("height", "width", "stride"), [(8, 8, 2), (7, 5, 2), (9, 10, 3)])
def test_one_destination_in_every_whole_cell(height, width, stride):
    destinations = draw_destinations(height, width, stride, seed=0, step=torch.tensor(981.0))
    y, x = destinations // width, destinations % width
    cells = (y // stride) * (width // stride) + x // stride
    assert torch.equal(cells, torch.arange((height // stride) * (width // stride)))
    assert (y < height).all()
    assert (x < width // stride * stride).all()


def test_destinations_are_spread_evenly_and_depend_on_seed_and_step_alone():
    draws = [draw_destinations(64, 64, 2, seed, torch.tensor(float(step))) for seed in (0, 1) for step in (1, 2)]
    for i, draw in enumerate(draws):
        corner = (draw // 64) % 2 * 2 + draw % 2
        # 1024 draws among four corners: five standard deviations of 13.9.
        assert (corner.bincount(minlength=4) - 256).abs().max() < 70
        assert torch.equal(draw, draw_destinations(64, 64, 2, i // 2, torch.tensor(1.0 + i % 2)))
        assert all((draw != other).float().mean() > 0.5 for other in draws[:i])


def test_the_global_generator_is_left_alone():
    state = torch.get_rng_state()
    ToMeConfig().cluster(torch.ones(1, 16, 3), (4, 4), torch.tensor(1), num_clusters=4)
    assert torch.equal(torch.get_rng_state(), state)


def test_odd_grids_keep_at_least_the_destinations():
    tree = ToMeConfig().cluster(torch.randn(1, 35, 3), (7, 5), torch.tensor(1.0), num_clusters=1)
    assert tree.num_clusters == 3 * 2


def test_a_grid_smaller_than_a_cell_is_refused():
    with pytest.raises(ValueError, match="stride of 4 is larger than the grid of 2 x 8 tokens; draw a larger image"):
        draw_destinations(2, 8, stride=4, seed=0, step=torch.tensor(1))


def test_cuts_of_one_matching_nest():
    tree = ToMeConfig().cluster(torch.randn(2, 64, 3), (8, 8), torch.tensor(1.0), num_clusters=16)
    finer, coarser = tree.cut(40), tree.cut(20)
    for fine, coarse in zip(finer, coarser, strict=True):
        assert all(len(coarse[fine == label].unique()) == 1 for label in range(40))
