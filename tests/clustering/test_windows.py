"""Windows: the clustering as if tokens of different windows were infinitely far apart."""

import pytest
import torch

from atc_diffusion import ATCConfig, agglomerate
from atc_diffusion.clustering.windows import cluster_windows

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
    for num_clusters in {len(windows.unique()), height * width // 2, height * width}:
        labels = cluster_windows(tokens, 1, (height, width), window, linkage).cut(num_clusters)
        expected = agglomerate(distances, num_clusters, linkage, metric="precomputed", backend="scipy")
        assert torch.equal(labels, expected)


@pytest.mark.parametrize(("grid", "windows"), [((8, 8), 4), ((7, 9), 4), ((5, 5), 1)])
def test_one_token_of_each_window_is_kept_at_least(grid, windows):
    features = torch.randn(2, grid[0] * grid[1], 6)
    tree = ATCConfig(window_size=5).cluster(features, grid, torch.tensor(0), num_clusters=1)
    assert tree.num_clusters == windows
    assert all(len(labels.unique()) == windows for labels in tree.cut(windows))


def test_flat_windows_keep_fewer():
    detailed = torch.randn(1, 4, 4, 6)
    picture = torch.cat([detailed, torch.ones(1, 4, 4, 6) + 1e-3 * detailed], dim=2)
    labels = cluster_windows(picture.flatten(1, 2), 16, (4, 8), window=4).cut(16).view(4, 8)
    assert len(labels[:, :4].unique()) > 4 * len(labels[:, 4:].unique())


def test_a_window_as_large_as_the_picture_changes_nothing():
    features = torch.randn(1, 20, 6)
    tree = ATCConfig(window_size=5).cluster(features, (4, 5), torch.tensor(0), num_clusters=10)
    assert torch.equal(tree.cut(10), agglomerate(features, 10))


def draw_uneven(height: int, width: int) -> torch.Tensor:
    """A picture `[2, N, 6]` of details, flat parts and equal tokens."""
    tokens = torch.randn(2, height * width, 6, dtype=torch.float64)
    tokens[0, : height * width // 2] = 1
    tokens[1, : height * width // 3] = tokens[1, : height * width // 3] * 1e-2 + 1
    return tokens


@pytest.mark.parametrize(("height", "width", "window"), [(8, 8, 4), (7, 9, 4), (12, 12, 4)])
@pytest.mark.parametrize("linkage", ["average", "complete", "single", "ward"])
@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_what_is_built_down_to_a_number_is_cut_as_the_whole_tree(height, width, window, linkage, backend):
    tokens = draw_uneven(height, width)
    whole = cluster_windows(tokens, 1, (height, width), window, linkage, backend)
    for fraction in (0.1, 0.5, 0.9, 1.0):
        num_clusters = max(whole.num_clusters, round(fraction * height * width))
        tree = cluster_windows(tokens, num_clusters, (height, width), window, linkage, backend)
        assert tree.num_clusters == num_clusters
        assert torch.equal(tree.cut(num_clusters), whole.cut(num_clusters))


@pytest.mark.parametrize("linkage", ["average", "complete", "ward"])
def test_windows_stop_together(linkage):
    """A detailed window stops early where a flat one has the merges that the picture needs."""
    tree = cluster_windows(draw_uneven(12, 12), 100, (12, 12), 4, linkage, "torch")
    merges = tree.heights.isfinite().sum(dim=1)
    assert (merges >= 44).all()
    assert (merges < 100).all()


@pytest.mark.parametrize("backend", ["numba", "scipy"])
def test_every_backend_clusters_windows(backend):
    tokens = torch.randn(2, 63, 6)
    labels, expected = (cluster_windows(tokens, 20, (7, 9), 4, backend=name).cut(20) for name in (backend, "torch"))
    assert torch.equal(labels, expected)
