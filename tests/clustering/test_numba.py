"""Where Numba cannot keep what it compiled, or cannot compile, clustering goes on."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import pytest
import torch

from atc_diffusion import ATCConfig, agglomerate, cluster_tree
from atc_diffusion.clustering._numba import entry
from atc_diffusion.clustering.placement import numba_problem

Compile = Callable[[], Callable[[float], float]]


def double(x: float) -> float:
    return 2 * x


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where Numba keeps compiled code."""
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def cached_files(directory: Path) -> list[Path]:
    return [path for path in directory.rglob("*") if path.is_file()]


def test_compiled_code_is_kept(directory: Path) -> None:
    assert entry(double)(2.0) == 4
    again: Any = entry(double)
    assert again(2.0) == 4
    assert sum(again.stats.cache_hits.values()) == 1


@pytest.mark.parametrize("suffix", [".nbi", ".nbc"])
@pytest.mark.parametrize("content", [lambda whole: b"", lambda whole: whole[: len(whole) // 2], lambda whole: b"junk"])
def test_a_damaged_cache_is_replaced(directory: Path, suffix: str, content: Callable[[bytes], bytes]) -> None:
    assert entry(double)(2.0) == 4
    (damaged,) = (path for path in cached_files(directory) if path.suffix == suffix)
    damaged.write_bytes(content(damaged.read_bytes()))
    assert entry(double)(2.0) == 4
    again: Any = entry(double)
    assert again(2.0) == 4
    assert sum(again.stats.cache_hits.values()) == 1


def test_a_full_disk_keeps_nothing_and_ends_nothing(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = entry(double)
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal = pytest.importorskip("signal")
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, limits[1]))  # as a quota: files end after one byte
    try:
        assert compiled(2.0) == 4
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert entry(double)(2.0) == 4


def test_a_cache_that_disappears_is_made_again(directory: Path) -> None:
    compiled = entry(double)
    assert compiled(2.0) == 4
    shutil.rmtree(directory)
    assert compiled(2) == 4  # of another type, so that it is compiled again
    assert cached_files(directory)


@pytest.mark.parametrize("locators", ["UserProvidedCacheLocator", "UserProvidedCacheLocator,UserWideCacheLocator"])
def test_without_a_directory_it_compiles_every_time(
    tmp_path: Path, locators: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a container that does not run as root and has no home: the loops are not kept, but they work."""
    (tmp_path / "file").touch()
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path / "file"))
    monkeypatch.setattr(numba.config, "CACHE_LOCATOR_CLASSES", locators, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    assert entry(double)(2.0) == 4


@pytest.mark.slow
def test_where_numba_compiles_nothing_plain_torch_clusters_and_says_so_once() -> None:
    code = """
import warnings, torch
from atc_diffusion import agglomerate
warnings.simplefilter("always")
with warnings.catch_warnings(record=True) as caught:
    labels = [agglomerate(torch.eye(3)[None], 3).tolist() for _ in range(2)]
assert labels == [[[0, 1, 2]]] * 2
print(*(warning.message for warning in caught))
try:
    agglomerate(torch.eye(3)[None], 3, backend="numba")
except ValueError as error:
    print(error)
"""
    environment = os.environ | {"NUMBA_DISABLE_JIT": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    problem = "Numba compiles nothing while NUMBA_DISABLE_JIT is set"
    assert done.stdout.splitlines() == [
        f"{problem}; plain torch clusters instead, which takes longer; backend='torch' avoids this warning",
        f"backend='numba' cannot be used: {problem}; use backend='torch'",
    ], done.stderr


@pytest.fixture
def _without_numba(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "numba", None)
    numba_problem.cache_clear()
    yield
    numba_problem.cache_clear()


@pytest.mark.usefixtures("_without_numba")
def test_without_numba_plain_torch_clusters_and_cuts():
    tokens = torch.randn(2, 30, 4)
    with pytest.warns(UserWarning, match="Numba cannot be imported .*; plain torch clusters instead"):
        tree = cluster_tree(tokens)
    expected = cluster_tree(tokens, backend="torch")
    assert torch.equal(tree.heights, expected.heights)
    labels = [tree.cut(num_clusters) for num_clusters in range(1, 31)]
    numba_problem.cache_clear()
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setitem(sys.modules, "numba", numba)
        assert all(torch.equal(ours, expected.cut(len(ours[0].unique()))) for ours in labels)


@pytest.mark.usefixtures("_without_numba")
@pytest.mark.parametrize("ask", [ATCConfig, lambda **options: agglomerate(torch.zeros(1, 6, 3), 2, **options)])
def test_numba_is_refused_where_it_cannot_be_imported(ask):
    with pytest.raises(ValueError, match=r"backend='numba' cannot be used: Numba cannot be imported \(.*\); use"):
        ask(backend="numba")
