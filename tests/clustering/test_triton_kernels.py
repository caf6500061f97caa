"""The CUDA kernels against the reference: on the device where there is one, else in Triton's interpreter."""

import os
import re
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

import atc_diffusion.clustering as clustering
from atc_diffusion import ClusterTree, agglomerate, cluster_tree
from atc_diffusion.clustering.windows import cluster_windows
from tests.helpers.labels import assert_valid

pytest.importorskip("triton")
import triton.language as tl
from triton.runtime import interpreter

from atc_diffusion.clustering import _torch, _triton, placement

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LINKAGES = ["average", "complete", "single", "ward"]
CASES = [
    ("average", "cosine"),
    ("average", "euclidean"),
    ("complete", "cosine"),
    ("single", "euclidean"),
    ("ward", "euclidean"),
    ("ward", "precomputed"),
    ("single", "precomputed"),
]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),  # in masked lanes
]
on_cuda = pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    """Few tokens go through all loops then: several tiles and blocks, launched rounds and rounds that are left."""
    monkeypatch.setattr(_triton, "ALONE", 6)
    monkeypatch.setattr(_triton, "ROUNDS", 2)
    monkeypatch.setattr(_triton, "BLOCK", 16)
    monkeypatch.setattr(_triton, "PROGRAMS", 3)
    monkeypatch.setattr(placement, "CHECKED_SIZES", (6, 24))
    monkeypatch.setattr(placement, "CHECKED_CHANNELS", 5)


@pytest.fixture(autouse=True)
def _quick_interpreter(monkeypatch):
    """The interpreter patches triton.language in every call of a function; once in every launch is quicker."""
    if DEVICE == "cpu":
        interpreter._patch_lang(tl.cdiv.fn)
        monkeypatch.setattr(interpreter.InterpretedFunction, "__call__", lambda self, *a, **k: self.rewrite()(*a, **k))


def draw_tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def draw_problem(metric: str, batch: int, num_tokens: int, channels: int, seed: int = 0) -> Tensor:
    tokens = draw_tokens(batch, num_tokens, channels, seed=seed)
    return torch.cdist(tokens, tokens) if metric == "precomputed" else tokens


def chain(num_tokens: int) -> Tensor:
    """Points `[1, N, 1]`, every one as far from the last as that from the first: one pair a round is reciprocal."""
    return 2 ** torch.arange(num_tokens, dtype=torch.float32, device=DEVICE)[None, :, None]


@pytest.mark.parametrize(("linkage", "metric"), CASES)
@pytest.mark.parametrize(("batch", "num_tokens", "channels"), [(1, 3, 3), (2, 19, 20)])
def test_equals_the_reference(linkage, metric, batch, num_tokens, channels):
    problem = draw_problem(metric, batch, num_tokens, channels)
    num_clusters = num_tokens // 3
    labels, scipys, torchs = (
        agglomerate(problem, num_clusters, linkage, metric, backend) for backend in ("triton", "scipy", "torch")
    )
    assert torch.equal(labels, scipys)
    assert torch.equal(labels, torchs)


@pytest.mark.parametrize("linkage", ["average", "ward", "complete"])
@pytest.mark.parametrize(("num_tokens", "channels"), [(17, 130), (70, 3)])
def test_odd_sizes(linkage, num_tokens, channels):
    tokens = draw_tokens(1, num_tokens, channels)
    labels = agglomerate(tokens, 7, linkage, backend="triton")
    assert torch.equal(labels, agglomerate(tokens, 7, linkage, backend="scipy"))


@pytest.mark.parametrize(("linkage", "metric"), CASES[2:5])
def test_one_tree_serves_every_cut(linkage, metric):
    tokens = draw_tokens(1, 20, 3)
    tree, scipys = (cluster_tree(tokens, 1, linkage, metric, backend) for backend in ("triton", "scipy"))
    for num_clusters in range(1, 21):
        assert torch.equal(tree.cut(num_clusters), scipys.cut(num_clusters))
    assert torch.allclose(tree.heights.sort(dim=1).values, scipys.heights.sort(dim=1).values, atol=1e-6)


@pytest.mark.parametrize("linkage", LINKAGES)
def test_a_single_token_two_and_as_many_clusters_as_tokens(linkage):
    assert agglomerate(draw_tokens(2, 1, 3), 1, linkage, backend="triton").tolist() == [[0], [0]]
    assert agglomerate(draw_tokens(2, 2, 1), 1, linkage, backend="triton").tolist() == [[0, 0], [0, 0]]
    assert agglomerate(draw_tokens(1, 4, 3), 4, linkage, backend="triton").tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize("linkage", LINKAGES)
def test_chains_take_more_rounds_than_are_launched(linkage):
    labels = [agglomerate(chain(12), 3, linkage, "euclidean", backend) for backend in ("triton", "scipy")]
    assert torch.equal(*labels)


def test_a_batch_of_different_problems_equals_its_items():
    tokens = torch.cat([draw_tokens(1, 18, 1), torch.ones(1, 18, 1, device=DEVICE), chain(18)])
    trees = [cluster_tree(item, 5, "ward", backend="triton") for item in (tokens, *tokens.split(1))]
    assert torch.equal(trees[0].cut(5), torch.cat([tree.cut(5) for tree in trees[1:]]))
    assert torch.equal(trees[0].heights, torch.cat([tree.heights for tree in trees[1:]]))


@pytest.mark.parametrize("linkage", LINKAGES)
def test_ties_give_exactly_k_labels_and_the_heights_of_the_reference(linkage):
    tokens = draw_tokens(1, 9, 3)[:, torch.arange(27) * 7 % 9]
    tree, scipys = (cluster_tree(tokens, 1, linkage, "euclidean", backend) for backend in ("triton", "scipy"))
    # Equal tokens are apart by the root of a rounding error, of 2^-23 times their squared norms.
    assert torch.allclose(tree.heights.sort(dim=1).values, scipys.heights.sort(dim=1).values, atol=4e-3)
    for num_clusters in (1, 9, 26):
        assert_valid(tree.cut(num_clusters), num_clusters)


def test_identical_tokens_pair_off_instead_of_queueing_at_one(monkeypatch):
    """Five launched rounds are enough for 32 of them, so that nothing is missing without the last launch."""
    tokens = torch.ones(1, 32, 3, device=DEVICE)
    cluster_tree(tokens, backend="triton")  # the check of the kernels comes first
    monkeypatch.setattr(_triton, "ROUNDS", 5)
    monkeypatch.setattr(_triton, "kernel", WrongKernel("all"))
    assert cluster_tree(tokens, backend="triton").heights.isfinite().sum() == 31


@pytest.mark.parametrize("linkage", LINKAGES)
def test_degenerate_tokens_in_low_precision_give_valid_labels(linkage):
    tokens = draw_tokens(6, 11, 4).half()
    for i, value in enumerate([0.0, 3e4, float("nan"), float("inf"), -float("inf")]):
        tokens[i, i % 2 :: 2 - i % 2] = value
    assert_valid(agglomerate(tokens, 6, linkage, backend="triton").cpu(), 6)


def test_windows_are_clustered():
    tokens = draw_tokens(2, 63, 6)
    labels, expected = (cluster_windows(tokens, 20, (7, 9), 4, backend=name).cut(20) for name in ("triton", "torch"))
    assert torch.equal(labels, expected)


@pytest.mark.parametrize("linkage", ["average", "complete"])
def test_windows_stop_together(linkage, monkeypatch):
    monkeypatch.setattr(_triton, "ROUNDS", 5)
    tokens = draw_tokens(1, 64, 6)
    tokens[:, :32] = tokens[:, :32] * 1e-2 + 1
    tree = cluster_windows(tokens, 40, (8, 8), 4, linkage, "triton")
    assert torch.equal(tree.cut(40), cluster_windows(tokens, 1, (8, 8), 4, linkage, "scipy").cut(40))
    assert 24 <= tree.heights.isfinite().sum() < 60


def test_low_precision_is_clustered_in_float32():
    tokens = draw_tokens(1, 17, 8).half()
    labels = [agglomerate(x, 6, backend="triton") for x in (tokens, tokens.float())]
    assert torch.equal(*labels)


def test_negative_distances_are_ordered_too():
    distances = draw_problem("precomputed", 1, 12, 3)
    labels = [agglomerate(d, 4, "complete", "precomputed", backend="triton") for d in (distances, distances - 2)]
    assert torch.equal(*labels)


def test_tokens_stay_as_they_are():
    for metric in ("cosine", "precomputed"):
        problem = draw_problem(metric, 1, 9, 4)
        before = problem.clone()
        agglomerate(problem, 3, "average", metric, backend="triton")
        assert torch.equal(problem, before)


@pytest.mark.parametrize("backend", clustering.BACKENDS)
@pytest.mark.parametrize("linkage", ["average", "complete"])
def test_autocast_changes_nothing(backend, linkage):
    tokens = draw_tokens(1, 20, 6)
    labels = agglomerate(tokens, 7, linkage, backend=backend)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert torch.equal(labels, agglomerate(tokens, 7, linkage, backend=backend))


@pytest.fixture
def _unchecked():
    """As on a device's first use."""
    placement.triton_problem.cache_clear()
    yield
    placement.triton_problem.cache_clear()


@pytest.mark.usefixtures("_unchecked")
@pytest.mark.parametrize("linkage", ["average", "complete"])
def test_right_kernels_are_trusted(linkage):
    """Under autocast too, which lowers the precision of the products that plain torch computes."""
    with torch.autocast(DEVICE, torch.bfloat16):
        assert placement.triton_problem(torch.device(DEVICE), linkage, "cosine") is None


class WrongKernel:
    """Launches the kernels, except that one does nothing, or spoils what it leaves if it is `pair`."""

    def __init__(self, step: str) -> None:
        self.step, self.kernel = step, _triton.kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(data: Tensor, links: Tensor, *arguments: Any, STEP: str, **options: Any) -> None:
            wrong = self.step == STEP
            if not wrong or STEP == "pair":
                self.kernel[grid](data, links, *arguments, STEP=STEP, **options)
            if wrong and STEP == "pair":
                links[:, _triton.PARENT.value] = 0

        return launch


def _raises(tokens: Tensor, *_: object) -> ClusterTree:
    raise RuntimeError("no kernel image")


def _reverses(tokens: Tensor, num_clusters: int, linkage: str, metric: str) -> ClusterTree:
    return _torch.build_tree(tokens.flip(1).cpu(), num_clusters, linkage, metric)


WRONG_FORMS = [
    ({"build_tree": _raises}, "RuntimeError: no kernel image"),
    ({"build_tree": _reverses}, "other clusters of 6 and 24 tokens"),
    ({"kernel": WrongKernel("all")}, "other clusters of 6 and 24 tokens"),
    *(({"kernel": WrongKernel(step)}, "other clusters of 24 tokens") for step in ("search", "pair", "merge")),
]


@pytest.mark.usefixtures("_unchecked")
@pytest.mark.parametrize(("form", "problem"), WRONG_FORMS)
def test_a_wrong_kernel_steps_aside_and_raises_where_it_was_asked_for(monkeypatch, form, problem):
    monkeypatch.setattr(_triton, *next(iter(form.items())))
    problem = rf"the Triton kernels for average linkage fail on .* \({problem}\); please report this, "
    assert re.match(problem, placement.triton_problem(torch.device(DEVICE), "average", "cosine") or "")
    with pytest.raises(RuntimeError, match=f"{problem}.*; use backend='torch'"):
        agglomerate(draw_tokens(1, 20, 4), 7, backend="triton")


def test_every_kernel_compiles_and_fits_into_the_shared_memory_of_small_gpus(pytestconfig):
    cases = [("75", "average"), ("80", "ward"), ("90", "average"), ("90", "complete")]  # one process compiles them all
    command = [sys.executable, "-m", "tests.helpers.compile_kernels", *(word for case in cases for word in case)]
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run(command, env=environment, cwd=pytestconfig.rootpath, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kernels = [line.split() for line in done.stdout.splitlines()]
    steps = ("search", "pair", "merge", "all")
    assert {tuple(kernel) for *kernel, _ in kernels} == {(*case, step) for case in cases for step in steps}
    assert max(int(shared) for *_, shared in kernels) <= 64 * 1024


@on_cuda
@pytest.mark.parametrize(("linkage", "metric"), CASES)
def test_a_graph_captures_it_and_nothing_synchronises(linkage, metric):
    problems = [draw_problem(metric, 2, 200, 20, seed) for seed in range(3)]
    expected = [agglomerate(problem, 70, linkage, metric, "triton") for problem in problems]
    given = problems[0].clone()
    torch.cuda.set_sync_debug_mode("error")
    try:
        agglomerate(given, 70, linkage, metric, "triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        labels = agglomerate(given, 70, linkage, metric, "triton")
    for problem, expectation in zip(problems, expected, strict=True):
        given.copy_(problem)
        graph.replay()
        assert torch.equal(labels, expectation)


@on_cuda
@pytest.mark.parametrize(("linkage", "metric"), CASES)
def test_it_is_the_same_to_the_bit_every_time(linkage, metric, monkeypatch):
    """Programs that race would not be."""
    monkeypatch.undo()
    problem = draw_problem(metric, 2, 2000, 40)
    trees = [cluster_tree(problem, 1000, linkage, metric, "triton") for _ in range(20)]
    assert all(torch.equal(trees[0].heights, tree.heights) for tree in trees)
    assert all(torch.equal(trees[0].parents, tree.parents) for tree in trees)


@on_cuda
@pytest.mark.parametrize(("linkage", "metric"), CASES)
def test_large_problems_have_the_heights_of_the_reference(linkage, metric, monkeypatch):
    monkeypatch.undo()
    problem = draw_problem(metric, 2, 2049, 40)
    trees = [cluster_tree(problem, 1200, linkage, metric, backend) for backend in ("triton", "scipy")]
    ours, scipys = (tree.heights.sort(dim=1).values[:, : 2049 - 1200] for tree in trees)
    assert torch.allclose(ours, scipys, rtol=1e-4, atol=1e-4)
