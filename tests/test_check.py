"""`python -m atc_diffusion`: right on the CPU, and it names what was made wrong on purpose."""

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import SlicedAttnProcessor
from torch import Tensor

from atc_diffusion import ClusterTree, checks
from atc_diffusion.__main__ import main
from atc_diffusion.adapters.weights import attend
from atc_diffusion.checks import Finding, check_attention, check_clusterings, check_networks, check_processors, find
from atc_diffusion.clustering import _numba
from atc_diffusion.testing import TINY_NETWORKS

CPU = torch.device("cpu")


@pytest.mark.slow
def test_nothing_is_wrong_on_the_cpu(monkeypatch, capsys):
    one_linkage = partial(check_clusterings, linkages=["average"])
    monkeypatch.setattr(checks, "CHECKS", (one_linkage, *checks.CHECKS[1:]))
    assert main([]) == 0
    printed = capsys.readouterr().out
    assert "Merging is right on this machine" in printed
    for subject in (
        "average linkage by numba for tokens on cpu",
        "Stable Diffusion 3 merged on cpu in bfloat16",
        "Flux merged on cpu in float16",
        "sliced attention on cpu",
        "weights in a mask on cpu",
        "weights in wider heads on cpu",
        "speed on cpu",
    ):
        assert f"ok    {subject}" in printed


def problems(findings: Iterable[Finding]) -> dict[str, str]:
    return {finding.subject: finding.problem for finding in findings if finding.problem}


@pytest.mark.parametrize("wrong_for", [17, 320])
def test_a_kernel_that_is_wrong_for_odd_or_real_sizes_is_named(monkeypatch, wrong_for):
    right = _numba.build_tree

    def build_tree(tokens: Tensor, *choices: Any) -> ClusterTree:
        return right(tokens.flip(1) if tokens.shape[2] == wrong_for else tokens, *choices)

    monkeypatch.setattr(_numba, "build_tree", build_tree)
    assert list(problems(check_clusterings(CPU, ["average"]))) == ["average linkage by numba for tokens on cpu"]


def test_attention_that_forgets_the_sizes_of_clusters_is_named(monkeypatch):
    def forgetful(query: Tensor, key: Tensor, value: Tensor, log_weights: Tensor, widen: bool) -> Tensor:
        return attend(query, key, value, log_weights if widen else None, widen)

    monkeypatch.setattr(checks, "attend", forgetful)
    assert list(problems(check_attention(CPU))) == ["weights in a mask on cpu"]


def test_a_processor_that_raises_is_named(monkeypatch):
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no kernel image\nand more")

    monkeypatch.setattr(SlicedAttnProcessor, "__call__", fail)
    assert problems(check_processors(CPU)) == {"sliced attention on cpu": "RuntimeError: no kernel image"}


def test_a_network_of_which_fewer_attentions_are_merged_is_named(monkeypatch):
    monkeypatch.setattr(checks, "FAMILIES", {"sd15": "Stable Diffusion 1"})
    monkeypatch.setitem(TINY_NETWORKS, "sd15", replace(TINY_NETWORKS["sd15"], layers=4))
    expected = "RuntimeError: 3 of 4 self-attentions are merged"
    assert set(problems(check_networks(CPU)).values()) == {expected}


def test_a_family_that_needs_a_newer_diffusers_is_left_out(monkeypatch):
    monkeypatch.setattr(checks, "FAMILIES", {"z_image": "Z-Image"})
    monkeypatch.delitem(TINY_NETWORKS, "z_image", raising=False)
    assert not list(check_networks(CPU))


def test_a_device_that_fails_makes_the_command_fail(monkeypatch, capsys):
    monkeypatch.setattr(checks, "devices_found", lambda: [torch.device("mps", 0)])
    monkeypatch.setattr(checks, "CHECKS", (check_networks,))
    assert main(["check"]) == 1
    printed = capsys.readouterr().out
    assert "checks failed: " in printed
    assert "Stable Diffusion 1 merged on mps:0 in float32" in printed.split("checks failed: ")[1]


def test_a_result_that_is_no_number_is_wrong():
    assert Finding("x").problem is None
    assert find("x", lambda: float("nan"), 1.0).problem == "error nan, more than 1"


@pytest.mark.parametrize("command", ["tun", "--fast"])
def test_unknown_commands_are_refused(command):
    with pytest.raises(SystemExit, match="2"):
        main([command])
