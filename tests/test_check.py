"""`python -m atc_diffusion`: right on the CPU, and it names what was made wrong on purpose."""

from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import SlicedAttnProcessor

from atc_diffusion import check
from atc_diffusion.__main__ import main
from atc_diffusion.check import networks, processors
from atc_diffusion.check.clusterings import check_clusterings
from atc_diffusion.check.finding import Finding, find
from atc_diffusion.clustering import _numba

CPU = torch.device("cpu")


def test_nothing_is_wrong_on_the_cpu(capsys):
    assert main([]) == 0
    printed = capsys.readouterr().out
    assert "Merging is right on this machine" in printed
    networks = ("Stable Diffusion 3 merged on cpu in bfloat16", "Flux merged on cpu in float16")
    for subject in ("Numba", *networks, "sliced attention on cpu", "speed on cpu", "weights in wider heads on cpu"):
        assert subject.lower() in printed.lower()


def test_a_wrong_kernel_is_named(monkeypatch):
    right = _numba.build_tree
    monkeypatch.setattr(_numba, "build_tree", lambda tokens, *choices: right(tokens.flip(1), *choices))
    wrong = [finding.subject for finding in check_clusterings(CPU) if finding.problem]
    assert wrong == [f"{x} linkage by numba for tokens on cpu" for x in ("average", "complete", "single", "ward")]


def test_a_processor_that_raises_is_named(monkeypatch):
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no kernel image\nand more")

    monkeypatch.setattr(SlicedAttnProcessor, "__call__", fail)
    problems = {finding.subject: finding.problem for finding in processors.check_processors(CPU) if finding.problem}
    assert problems == {"sliced attention on cpu": "RuntimeError: no kernel image"}


def test_a_device_that_fails_makes_the_command_fail(monkeypatch, capsys):
    monkeypatch.setattr(check, "devices_found", lambda: [torch.device("mps", 0)])
    monkeypatch.setattr(networks, "NETWORKS", {"Stable Diffusion 1": networks.make_unet})
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
