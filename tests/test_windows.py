"""Windows: the same clustering, were tokens of different windows infinitely far apart."""

import pytest
import torch

from atc_diffusion import ATCConfig, agglomerate
from atc_diffusion.clustering.windows import agglomerate_windows, num_windows

GRIDS = [(8, 8, 4), (7, 9, 4), (6, 5, 3), (4, 12, 5), (1, 16, 4)]  # height, width, window


def window_of(height: int, width: int, window: int) -> torch.Tensor:
    """The number of every token's window, `[N]`, counted by hand."""

    def bands(length: int) -> torch.Tensor:
        count = -(-length // window)
        sizes = torch.tensor([length // count + (i < length % count) for i in range(count)])
        return torch.arange(count).repeat_interleave(sizes)

    return (bands(height)[:, None] * width + bands(width)[None, :]).flatten()


@pytest.mark.parametrize(("height", "width", "window"), GRIDS)
@pytest.mark.parametrize("linkage", ["average", "complete", "single", "ward"])
def test_tokens_of_different_windows_are_infinitely_far_apart(height, width, window, linkage):
    tokens = torch.randn(2, height * width, 6, dtype=torch.float64)
    windows = window_of(height, width, window)
    if linkage == "ward":
        distances = torch.cdist(tokens, tokens)
    else:
        unit = torch.nn.functional.normalize(tokens, dim=2)
        distances = 1 - unit @ unit.mT
    distances[:, windows[:, None] != windows[None, :]] = 1e6
    for num_clusters in {num_windows(height, width, window), height * width // 2, height * width}:
        labels = agglomerate_windows(tokens, num_clusters, height, width, window, linkage, None)
        expected = agglomerate(distances, num_clusters, linkage, metric="precomputed", backend="scipy")
        assert torch.equal(labels, expected)


@pytest.mark.parametrize(("grid", "r", "kept"), [((8, 8), 0.5, 32), ((8, 8), 0.01, 4), ((7, 9), 0.4, 25)])
def test_a_share_is_kept_of_all_windows_together_and_one_token_of_each_at_least(grid, r, kept):
    features = torch.randn(2, grid[0] * grid[1], 6)
    merge_map = ATCConfig(r=r, window=5).merge_map(features, grid, torch.tensor(0))
    assert merge_map.num_clusters == kept
    assert all(len(labels.unique()) == kept for labels in merge_map.labels)


def test_flat_windows_keep_fewer():
    detailed = torch.randn(1, 4, 4, 6)
    picture = torch.cat([detailed, torch.ones(1, 4, 4, 6) + 1e-3 * detailed], dim=2)
    labels = agglomerate_windows(picture.flatten(1, 2), 16, 4, 8, 4, "average", None).view(4, 8)
    assert len(labels[:, :4].unique()) > 4 * len(labels[:, 4:].unique())


def test_a_window_as_large_as_the_picture_changes_nothing():
    features = torch.randn(1, 20, 6)
    labels = ATCConfig(r=0.5, window=5).merge_map(features, (4, 5), torch.tensor(0)).labels
    assert torch.equal(labels, agglomerate(features, 10))


@pytest.mark.parametrize("backend", ["scipy", "triton"])
def test_every_backend_clusters_windows(backend):
    tokens = torch.randn(2, 63, 6)
    labels = agglomerate_windows(tokens, 20, 7, 9, 4, "average", backend)
    assert torch.equal(labels, agglomerate_windows(tokens, 20, 7, 9, 4, "average", "torch"))
