"""The laws of clustering, against the definition, SciPy and fastcluster."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import fastcluster
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.cluster import hierarchy
from scipy.spatial.distance import pdist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from atc_diffusion import ClusterTree, agglomerate, cluster_tree
from tests.helpers.labels import assert_valid, canonical

LINKAGES = ["average", "complete", "single", "ward"]
BACKENDS = ["numba", "torch", "scipy"]

linkages = st.sampled_from(LINKAGES)
seeds = st.integers(0, 2**32 - 1)
compiled = st.sampled_from(["numba", "torch"])


def draw_tokens(seed: int, *shape: int) -> Tensor:
    """Gaussian tokens in float64: no two distances are equal, or closer than rounding."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def draw_ties(seed: int, num_tokens: int) -> Tensor:
    """Symmetric distances `[1, N, N]` from a handful of values."""
    d = torch.randint(1, 5, (1, num_tokens, num_tokens), generator=torch.Generator().manual_seed(seed)).double()
    return torch.maximum(d, d.mT).masked_fill(torch.eye(num_tokens, dtype=torch.bool), 0)


def replay(merges: np.ndarray, num_clusters: int) -> Tensor:
    """Labels `[N]` after the first `N - num_clusters` rows of a SciPy linkage matrix."""
    num_tokens = len(merges) + 1
    members = {i: [i] for i in range(num_tokens)}
    for i, (a, b) in enumerate(merges[: num_tokens - num_clusters, :2].astype(int)):
        members[num_tokens + i] = members.pop(a) + members.pop(b)
    labels = torch.empty(num_tokens, dtype=torch.int64)
    for label, tokens in enumerate(members.values()):
        labels[tokens] = label
    return canonical(labels)


def cluster_distance(distances: Tensor, a: Tensor, b: Tensor, linkage: str) -> float:
    """Eqs. 1-3 of the ATC paper, between the clusters with the members `a` and `b`."""
    between = distances[a][:, b]
    return float({"single": between.min(), "complete": between.max(), "average": between.mean()}[linkage])


@given(seeds, linkages, st.integers(1, 3), st.integers(2, 40), st.integers(2, 8), st.floats(0, 1))
def test_equals_scipy_and_fastcluster(seed, linkage, batch, num_tokens, channels, share):
    tokens = draw_tokens(seed, batch, num_tokens, channels)
    num_clusters = max(1, round(share * num_tokens))
    labels = agglomerate(tokens, num_clusters, linkage)
    metric = "euclidean" if linkage == "ward" else "cosine"
    for item, ours in zip(tokens.numpy(), labels, strict=True):
        for oracle in (hierarchy.linkage, fastcluster.linkage):
            assert torch.equal(ours, replay(oracle(pdist(item, metric), linkage), num_clusters))


@given(seeds, linkages, st.integers(2, 40), st.floats(0, 1))
def test_backends_agree(seed, linkage, num_tokens, share):
    tokens = draw_tokens(seed, 1, num_tokens, 5)
    num_clusters = max(1, round(share * num_tokens))
    ours, *others = (agglomerate(tokens, num_clusters, linkage, backend=backend) for backend in BACKENDS)
    assert all(torch.equal(ours, labels) for labels in others)


@given(seeds, st.sampled_from(["average", "complete", "single"]), st.integers(2, 10), st.booleans(), compiled)
def test_each_merge_joins_a_closest_pair(seed, linkage, num_tokens, ties, backend):
    """The definition itself; it decides on ties too, where oracles may differ."""
    distances = draw_ties(seed, num_tokens) if ties else torch.cdist(x := draw_tokens(seed, 1, num_tokens, 3), x)
    tree = cluster_tree(distances, 1, linkage, "precomputed", backend)
    for num_clusters in range(num_tokens, 1, -1):
        labels, after = tree.cut(num_clusters)[0], tree.cut(num_clusters - 1)[0]
        members = [torch.where(labels == i)[0] for i in range(num_clusters)]
        apart = {
            (i, j): cluster_distance(distances[0], members[i], members[j], linkage)
            for i in range(num_clusters)
            for j in range(i)
        }
        joined = [d for (i, j), d in apart.items() if after[members[i][0]] == after[members[j][0]]]
        assert joined == [pytest.approx(min(apart.values()), rel=1e-12)]


@given(seeds, linkages, st.integers(2, 30))
def test_ties_and_duplicates_give_exactly_k_canonical_labels_and_the_heights_of_scipy(seed, linkage, distinct):
    tokens = draw_tokens(seed, 1, distinct, 3)
    tokens = tokens[:, torch.randint(distinct, (2 * distinct,), generator=torch.Generator().manual_seed(seed))]
    trees = [cluster_tree(tokens, 1, linkage, backend=backend) for backend in BACKENDS]
    *ours, scipys = (tree.heights.sort(dim=1).values[:, :-1] for tree in trees)
    # Of nearly equal tokens Euclidean distance is the root of a rounding error: sqrt(1e-16).
    atol = 1e-6 if linkage == "ward" else 1e-12
    assert all(torch.allclose(heights, scipys, atol=atol) for heights in ours)
    for num_clusters in (1, distinct, 2 * distinct - 1):
        for tree in trees:
            assert_valid(tree.cut(num_clusters), num_clusters)


@given(seeds, linkages, st.integers(1, 3), st.integers(1, 40))
def test_partitions_nest_and_one_tree_serves_every_cut(seed, linkage, batch, num_tokens):
    tokens = draw_tokens(seed, batch, num_tokens, 4)
    tree = cluster_tree(tokens, linkage=linkage)
    finer = torch.arange(num_tokens).expand(batch, -1)
    for num_clusters in range(num_tokens, 0, -max(1, num_tokens // 5)):
        labels = tree.cut(num_clusters)
        assert_valid(labels, num_clusters)
        assert torch.equal(labels, agglomerate(tokens, num_clusters, linkage))
        for fine, coarse in zip(finer, labels, strict=True):
            assert len(torch.stack([fine, coarse]).unique(dim=1)[0]) == fine.max() + 1
        finer = labels


@given(seeds, linkages, st.integers(2, 20), st.floats(0, 1))
def test_cut_at_a_distance_is_scipys_fcluster(seed, linkage, num_tokens, quantile):
    tokens = draw_tokens(seed, 1, num_tokens, 4)
    merges = hierarchy.linkage(pdist(tokens[0].numpy(), "euclidean" if linkage == "ward" else "cosine"), linkage)
    distance = float(np.quantile(merges[:, 2], quantile)) + 1e-9
    expected = torch.from_numpy(hierarchy.fcluster(merges, distance, "distance"))
    assert torch.equal(cluster_tree(tokens, linkage=linkage).cut_at(distance)[0], canonical(expected))


@given(seeds, linkages, st.integers(2, 30))
def test_permuting_tokens_permutes_the_partition(seed, linkage, num_tokens):
    tokens = draw_tokens(seed, 1, num_tokens, 4)
    permutation = torch.randperm(num_tokens, generator=torch.Generator().manual_seed(seed))
    num_clusters = (num_tokens + 1) // 2
    labels = agglomerate(tokens, num_clusters, linkage)[0]
    permuted = agglomerate(tokens[:, permutation], num_clusters, linkage)[0]
    assert torch.equal(permuted, canonical(labels[permutation]))


@pytest.mark.parametrize("backend", ["numba", "torch"])
@pytest.mark.parametrize("linkage", LINKAGES)
def test_a_batch_equals_its_items(linkage, backend):
    tokens = draw_tokens(0, 30, 70, 6)  # enough distances for several threads
    tokens[1] = 0  # items that end after different numbers of rounds
    together = agglomerate(tokens, 20, linkage, backend=backend)
    alone = [agglomerate(item[None], 20, linkage, backend=backend) for item in tokens]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("backend", ["numba", "torch"])
@pytest.mark.parametrize("linkage", LINKAGES)
@pytest.mark.parametrize("num_tokens", [63, 257])
def test_float32_equals_the_reference(linkage, num_tokens, backend):
    tokens = draw_tokens(1, 2, num_tokens, 16).float()
    for num_clusters in (1, num_tokens // 3, num_tokens - 1):
        labels = agglomerate(tokens, num_clusters, linkage, backend=backend)
        assert torch.equal(labels, agglomerate(tokens.double(), num_clusters, linkage, backend="scipy"))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("linkage", LINKAGES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("value", [0.0, 1.0, 3e4, float("nan"), float("inf"), -float("inf")])
def test_degenerate_tokens_give_valid_labels(backend, linkage, dtype, value):
    tokens = draw_tokens(2, 2, 33, 4).to(dtype)
    tokens[0] = value
    tokens[1, ::2] = value
    for num_clusters in (1, 7, 33):
        assert_valid(agglomerate(tokens, num_clusters, linkage, backend=backend), num_clusters)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_degenerate_distances_are_far(value, backend):
    distances = torch.tensor([[[0.0, value, 1.0], [value, 0.0, 2.0], [1.0, 2.0, 0.0]]])
    assert agglomerate(distances, 2, "complete", metric="precomputed", backend=backend).tolist() == [[0, 1, 0]]


@pytest.mark.parametrize("metric", ["cosine", "euclidean", "precomputed"])
def test_the_compiled_loops_leave_tokens_as_they_are(metric):
    tokens = torch.rand(1, 30, 30)
    before = tokens.clone()
    agglomerate(tokens, 7, metric=metric, backend="numba")
    assert torch.equal(tokens, before)


def test_tokens_that_do_not_lie_in_a_row_are_read_as_they_are():
    tokens = draw_tokens(0, 2, 40, 6).mT.contiguous().mT
    assert torch.equal(agglomerate(tokens, 9, backend="numba"), agglomerate(tokens, 9, backend="scipy"))


def test_threads_cluster_at_once():
    batches = [draw_tokens(seed, 4, 256, 8) for seed in range(8)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda tokens: agglomerate(tokens, 50, backend="numba"), batches))
    assert all(torch.equal(a, agglomerate(b, 50, backend="numba")) for a, b in zip(together, batches, strict=True))


def test_a_matrix_that_is_not_symmetric_to_the_last_bit_comes_to_an_end():
    distances = torch.ones(1, 40, 40) + 1e-6 * torch.rand(1, 40, 40)
    assert_valid(agglomerate(distances, 3, "average", "precomputed", backend="numba"), 3)


@pytest.mark.parametrize("linkage", ["average", "complete", "ward"])
def test_one_cluster_that_takes_in_all_others_one_by_one(linkage):
    """Every merge leaves all the others without a neighbour that they know of."""
    tokens = 1.1 ** torch.arange(90, dtype=torch.float64)[None, :, None]
    trees = [cluster_tree(tokens, 1, linkage, "euclidean", backend) for backend in ("numba", "scipy")]
    assert all(torch.equal(trees[0].cut(k), trees[1].cut(k)) for k in (1, 10, 45, 80))


@pytest.mark.parametrize("linkage", LINKAGES)
def test_labels_are_those_of_the_merges_that_come_first(linkage):
    """At every number of clusters and at a distance, also where the tensors are views."""
    tree = cluster_tree(draw_tokens(0, 3, 60, 4), linkage=linkage)
    views = ClusterTree(tree.parents.mT.contiguous().mT, tree.heights, tree.order)
    for num_clusters in range(1, 61):
        expected = labels_of(tree, [set(order[: 60 - num_clusters].tolist()) for order in tree.order])
        assert torch.equal(tree.cut(num_clusters), expected)
        assert torch.equal(views.cut(num_clusters), expected)
    middle = tree.heights.median().item()
    expected = labels_of(tree, [set(torch.where(heights <= middle)[0].tolist()) for heights in tree.heights])
    assert torch.equal(tree.cut_at(middle), expected)


def labels_of(tree: ClusterTree, absorbed: list[set[int]]) -> Tensor:
    """Follow every token's chain of parents up to the first that was not absorbed."""
    roots = torch.arange(tree.parents.shape[1]).repeat(len(tree.parents), 1)
    for item, gone in enumerate(absorbed):
        for token in sorted(gone):  # parents come before their children
            roots[item, token] = roots[item, tree.parents[item, token]]
    return torch.stack([canonical(row) for row in roots])


class Operations(TorchDispatchMode):
    """Counts the operations that torch runs."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("linkage", LINKAGES)
def test_identical_tokens_pair_off_instead_of_queueing_at_one(linkage):
    """Rounds, and so operations, grow with the logarithm of the number of tokens: from 5 of it to 10, not by 32."""
    counts = []
    for num_tokens in (32, 1024):
        with Operations() as operations:
            cluster_tree(torch.ones(1, num_tokens, 3), linkage=linkage, backend="torch")
        counts.append(operations.count)
    assert counts[1] < 3 * counts[0]


def test_a_single_cluster_and_a_single_token():
    assert agglomerate(torch.randn(2, 5, 3), 1).tolist() == [[0] * 5] * 2
    assert agglomerate(torch.randn(2, 1, 3), 1).tolist() == [[0], [0]]
    assert agglomerate(torch.randn(1, 4, 3), 4).tolist() == [[0, 1, 2, 3]]


def test_a_partial_tree_refuses_to_be_cut_too_low():
    tree = cluster_tree(draw_tokens(0, 1, 100, 3), num_clusters=50)
    assert isinstance(tree, ClusterTree)
    assert_valid(tree.cut(50), 50)
    with pytest.raises(ValueError, match="not built down to 2 clusters"):
        tree.cut(2)


@pytest.mark.parametrize("backend", ["torch", "numba", "scipy"])
def test_a_tree_is_cut_only_at_distances_up_to_which_it_was_built(backend):
    tokens = draw_tokens(0, 1, 6, 3)
    whole, tree = cluster_tree(tokens, backend=backend), cluster_tree(tokens, 4, backend=backend)
    low = float(whole.heights.min())
    assert torch.equal(tree.cut_at(low / 2), whole.cut_at(low / 2))
    with pytest.raises(ValueError, match=r"not built up to a distance of 9.0; build it with num_clusters=1"):
        tree.cut_at(9.0)


@pytest.mark.parametrize("distance", ["0.5", None, [0.5], float("nan"), True])
def test_what_is_no_distance_is_named(distance):
    with pytest.raises(ValueError, match="distance must be a number, got"):
        cluster_tree(draw_tokens(0, 1, 6, 3)).cut_at(distance)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"linkage": "centroid"}, "linkage must be one of 'average', 'complete', 'single', 'ward', got 'centroid'"),
        ({"metric": "manhattan"}, "metric must be one of"),
        ({"backend": "numpy"}, "backend must be one of 'torch', 'numba', 'scipy', 'triton', got 'numpy'"),
        ({"linkage": "ward", "metric": "cosine"}, "use metric='euclidean'"),
        ({"num_clusters": 0}, "between 1 and the 6 tokens there are, got 0"),
        ({"num_clusters": 7}, "between 1 and the 6 tokens there are, got 7"),
        ({"tokens": torch.zeros(6, 3)}, r"\[B, N, C\], got torch.float32 \[6, 3\]"),
        ({"tokens": torch.zeros(1, 6, 3, dtype=torch.int64)}, "torch.int64"),
        ({"tokens": np.zeros((1, 6, 3))}, r"float tensor \[B, N, C\], got ndarray"),
        ({"tokens": [[[0.0, 1.0]]]}, r"float tensor \[B, N, C\], got list"),
        ({"tokens": None}, r"float tensor \[B, N, C\], got NoneType"),
        ({"tokens": torch.zeros(6)}, r"\[B, N, C\], got torch.float32 \[6\]"),
        ({"tokens": torch.zeros(())}, r"\[B, N, C\], got torch.float32 \[\]"),
        ({"tokens": torch.zeros(2, 1, 6, 3)}, r"got torch.float32 \[2, 1, 6, 3\]"),
        ({"tokens": torch.zeros(1, 0, 3)}, "between 1 and the 0 tokens there are, got 2"),
        ({"tokens": torch.zeros(1, 6, 3, dtype=torch.complex64)}, "torch.complex64"),
        ({"num_clusters": 2.5}, "num_clusters must be a whole number, got 2.5"),
        ({"num_clusters": None}, "num_clusters must be a whole number, got None"),
        ({"num_clusters": "2"}, "num_clusters must be a whole number, got '2'"),
        ({"num_clusters": True}, "num_clusters must be a whole number, got True"),
        ({"metric": "precomputed"}, "must be square"),
        ({"metric": ""}, "metric must be one of 'cosine', .*, got ''"),
    ],
)
@pytest.mark.parametrize("function", [agglomerate, cluster_tree])
def test_bad_input_is_named(function, options, message):
    with pytest.raises(ValueError, match=message):
        function(**({"tokens": torch.zeros(1, 6, 3), "num_clusters": 2} | options))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("linkage", LINKAGES)
def test_no_items_and_no_channels_are_clustered_too(linkage, backend):
    assert agglomerate(torch.zeros(0, 6, 3), 2, linkage, backend=backend).shape == (0, 6)
    assert_valid(agglomerate(torch.zeros(2, 6, 0), 4, linkage, backend=backend), 4)


@pytest.mark.parametrize("num_clusters", [np.int64(3), torch.tensor([3, 1]).tolist()[0]])
def test_whole_numbers_of_other_types_are_numbers_of_clusters(num_clusters):
    tokens = draw_tokens(0, 1, 6, 3)
    assert torch.equal(agglomerate(tokens, num_clusters), agglomerate(tokens, 3))


def test_tokens_without_data_have_labels_without_data():
    labels = agglomerate(torch.empty(2, 9, 3, device="meta"), 4)
    assert (labels.shape, labels.dtype, labels.is_meta) == ((2, 9), torch.int64, True)
