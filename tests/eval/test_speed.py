"""The benchmark's parts, run at tiny size; their times are not tested."""

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import speed
from atc_diffusion import ATCConfig
from atc_diffusion.testing import FLUX, PIXART, SD3, SDXL, UNET
from atc_eval.benchmark.clustering import engines, gaussian, same_partition
from atc_eval.benchmark.full_size import MODELS, load, make_inputs
from atc_eval.benchmark.step import METHODS, Denoising, Setting, select, self_attention, share_weights
from atc_eval.benchmark.timing import table, take_turns
from atc_eval.method import Method

TINY = ("--size 64", "--keep 60", "--tokens 64", "--repeats 1")

Run = Callable[[str], list[list[str]]]


@pytest.fixture
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    load.cache_clear()
    flux = FLUX | {"in_channels": 64, "guidance_embeds": True}
    tiny = {"sd15": UNET, "sdxl": SDXL, "pixart-sigma": PIXART, "sd3-medium": SD3, "flux-dev": flux}
    for name, config in tiny.items():
        levels = (2,) if name == "sdxl" else MODELS[name].levels
        monkeypatch.setitem(MODELS, name, replace(MODELS[name], config=config, levels=levels))


@pytest.fixture
def run(_tiny: None, capsys: pytest.CaptureFixture[str]) -> Run:
    """The cells of all rows that the benchmark prints."""

    def cells(line: str) -> list[list[str]]:
        others = [option for option in TINY if option.split()[0] not in line]
        speed.main(" ".join([*others, line]).split())
        return rows(capsys.readouterr().out)

    return cells


def rows(text: str) -> list[list[str]]:
    """Cells of the tables' rows, without their headers."""
    tables = [re.findall(r"^\| (.*) \|$", table, re.MULTILINE)[2:] for table in text.split("\n## ")]
    return [row.split(" | ") for table in tables for row in table]


def test_everyone_warms_up_before_anyone_is_timed_and_then_they_alternate() -> None:
    calls: list[str] = []
    candidates = {name: lambda name=name: calls.append(name) for name in "ab"}
    timings = take_turns(candidates, repeats=2, device="cpu", calls=2, warm_ups=3)
    assert "".join(calls) == "aaabbb" + "aabb" + "aabb"
    assert list(timings) == ["a", "b"]


def test_self_attention_is_a_larger_part_of_larger_images(run: Run) -> None:
    small, large = run("--parts arithmetic --model sd15 --size 64 128")
    assert small[:2] == ["Stable Diffusion v1.5's UNet", "64 x 64"]
    assert 0 < float(small[3].rstrip("%")) < float(large[3].rstrip("%")) < 100


@pytest.mark.usefixtures("_tiny")
@pytest.mark.parametrize(("model", "levels"), [("sd15", (1, 2)), ("sdxl", (2, 4)), ("pixart-sigma", (2,))])
def test_self_attention_is_counted_as_pytorch_counts_it(model: str, levels: tuple[int, ...]) -> None:
    network = load(model, "meta", torch.float32)
    latents, inputs = make_inputs(model, network, 64)
    with FlopCounterMode(display=False) as counter:
        network(latents, timestep=torch.ones(2, device="meta"), **inputs)
    counted = 0
    for name, operations in counter.get_flop_counts().items():
        if name.endswith(".attn1"):
            counted += sum(flops for operation, flops in operations.items() if str(operation) == "aten.bmm")
    assert counted == sum(self_attention(network, 64, level) for level in levels)


def test_small_and_large_problems_stand_beside_the_quickest_other(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "SMALL", [(1, 24, 64), (16, 32, 384)])
    monkeypatch.setattr("atc_eval.benchmark.clustering.DISTANCES", 1)
    table = run("--parts small clustering")
    assert [row[0] for row in table[::4]] == ["1 x 24 x 64", "16 x 32 x 384", "1 x 64 x 320"]
    assert [row[1] for row in table] == ["average", "complete", "single", "ward"] * 3
    assert {row[3] for row in table} <= {"fastcluster", "scipy", "scikit-learn"}
    assert {row[6] for row in table} == {"yes"}


def test_partitions_are_compared_whatever_their_labels() -> None:
    a, renamed, other = np.array([0, 0, 1, 2]), np.array([5, 5, 3, 4]), np.array([0, 1, 1, 2])
    assert same_partition(a, renamed)
    assert not same_partition(a, other)
    assert not same_partition(a, np.zeros(4))


def test_an_engine_that_is_asked_for_another_number_of_clusters_gives_another_partition() -> None:
    ours = engines(gaussian(1, 32), 16, "average")["atc_diffusion"]()[0]
    assert not same_partition(ours, engines(gaussian(1, 32), 8, "average")["scipy"]()[0])


def test_steps_of_every_method_stand_beside_the_unmerged(run: Run) -> None:
    table = run("--parts step --model sd15 --keep 60 20")
    ours = [
        "ATCConfig.paper()",
        "ATCConfig()",
        "ATCConfig(recluster_threshold=inf)",
        "ATCConfig.fast()",
        "ATCConfig.fast(recluster_threshold=0)",
        "ATCConfig.fast(widen_heads=True)",
        "ATCConfig.fast(levels=(1, 2))",
    ]
    settings = {label: "keys {} %" if "fast" in label else "{} %" for label in ours}
    rows = {keep: [[label, settings[label].format(keep)] for label in ours] for keep in (60, 20)}
    others = [["unmerged", ""], ["tomesd", "60 %"], ["ToDo", "keys 25 %"]]
    assert [row[:2] for row in table] == [*others, *rows[60], *rows[20]]
    assert table[0][3] == "1.00"
    assert [row[4] for row in table[:10]] == ["", "", "", "3", "1", "0", "1", "3", "1", "2.33"]


@pytest.mark.slow
def test_compiled_steps_have_rows_too(run: Run) -> None:
    with torch.compiler.set_stance("force_eager"):
        table = run("--parts compile")
    assert [row[0] for row in table] == ["unmerged", "ATCConfig()", "ATCConfig.fast()"]


def test_training_is_timed_with_what_it_keeps_for_the_backward_pass(run: Run) -> None:
    table = run("--parts training --model sd15 --keep 50")
    assert [row[:3] for row in table[:4]] == [
        ["off", "unmerged", ""],
        ["off", "tomesd", "50 %"],
        ["off", "ATCConfig()", "50 %"],
        ["off", "ATCConfig.fast()", "keys 50 %"],
    ]
    saved = [int(row[5]) for row in table]
    assert all(few < many for few, many in zip(saved[4:], saved[:4], strict=True))


def test_the_unmerged_is_timed_once_and_who_cannot_keep_so_few_not_at_all() -> None:
    assert [(each.label, each.setting) for each in select([0.6, 0.2], ["tomesd", "todo"], "sd15")] == [
        ("unmerged", ""),
        ("tomesd", "60 %"),
        ("ToDo", "keys 25 %"),
    ]


def test_transformers_have_methods_of_their_own(run: Run) -> None:
    table = run("--parts step --model sd3-medium --blocks 4 --dtype bfloat16")
    names = ["unmerged", "ToMeConfig()", "ATCConfig.paper()", "ATCConfig()", "ATCConfig(recluster_threshold=inf)"]
    fast = ["ATCConfig.fast()", "ATCConfig.fast(recluster_threshold=0)", "ATCConfig.fast(widen_heads=True)"]
    assert [row[0] for row in table] == [*names, *fast]
    assert [row[4] for row in table] == ["", "4", "4", "1.33", "0", "1.33", "4", "1.33"]


def test_of_rotary_networks_only_keys_merge(run: Run) -> None:
    table = run("--parts step arithmetic --model flux-dev --blocks 2 --keep 25")
    fast = ["ATCConfig.fast()", "ATCConfig.fast(recluster_threshold=0)", "ATCConfig.fast(widen_heads=True)"]
    assert [row[0] for row in table[1:]] == ["unmerged", *fast]
    assert [row[4] for row in table[1:]] == ["", "1.33", "4", "1.33"]


def denoising(model: str, method: Method) -> Denoising:
    return Denoising(setting := Setting(model, 64, "cpu", torch.float32), share_weights(setting.load()), method)


@pytest.mark.usefixtures("_tiny")
@pytest.mark.parametrize(
    ("model", "name"),
    [
        *(("sdxl", name) for name in METHODS if name != "tome"),
        *((model, name) for model in ("pixart-sigma", "sd3-medium") for name in ("tome", "atc-fast")),
    ],
)
def test_every_method_changes_its_own_copy_alone(model: str, name: str) -> None:
    plain, changed = denoising(model, Method()), denoising(model, METHODS[name](0.25, MODELS[model]))
    changed.inputs = plain.inputs
    changed.turn()
    plain.turn()
    network = plain.setting.load()
    assert torch.equal(plain.output, network(plain.latents, timestep=torch.tensor([999, 999]), **plain.inputs).sample)
    assert not torch.allclose(changed.output, plain.output, atol=1e-3)
    assert all(a is b for a, b in zip(network.parameters(), changed.network.parameters(), strict=True))


@pytest.mark.usefixtures("_tiny")
def test_a_turn_is_one_period_of_clustering_and_reuse() -> None:
    run = denoising("sd15", Method(ATCConfig(r=0.5, recluster_threshold=0.2)))
    for turns in (1, 2, 3):
        run.turn()
        assert next(run.timesteps) == 1000 - 4 * turns  # three steps, and the one that this looks at
        assert run.clusterings_per_step() == "1"  # three layers, every third step


@pytest.mark.usefixtures("_tiny")
def test_an_output_that_is_not_finite_is_refused() -> None:
    run = denoising("sd15", Method())
    run.inputs["encoder_hidden_states"] *= torch.inf
    run.turn()
    with pytest.raises(ValueError, match="the output of unmerged is not finite"):
        run.check_output()


@pytest.mark.parametrize(
    ("model", "parameters"),
    [
        ("sd15", 859_520_964),
        ("sdxl", 2_567_463_684),
        ("pixart-sigma", 610_856_096),
        ("sd3-medium", 2_028_328_000),
        ("flux-dev", 11_901_408_320),
    ],
)
def test_the_networks_have_full_size(model: str, parameters: int) -> None:
    with torch.device("meta"):
        network = MODELS[model].build()
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters


def test_a_table_ends_where_the_memory_of_a_gpu_does() -> None:
    def measure() -> Iterator[list[str]]:
        yield ["small", "1"]
        raise torch.OutOfMemoryError

    assert list(table("", "", ["size", "ms"], measure()))[-2:] == ["| small | 1 |", "| out of memory |  |"]


def test_all_that_is_printed_is_copied(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "new" / "speed.md"
    speed.main(["--parts", "clustering", "--tokens", "64", "--repeats", "1", "--out", str(out)])
    assert out.read_text() == capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_without_a_gpu_it_says_so_in_one_sentence() -> None:
    with pytest.raises(SystemExit, match=r"^PyTorch finds no CUDA GPU here; run this on a machine that has one, or"):
        speed.main(["--device", "cuda"])


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("--keep 0.6", "expected percentages of tokens kept, from 1 to 100, got 0.6; did you mean 60?"),
        ("--keep 60/10", "--keep: expected percentages of tokens kept, such as 50, got '60/10'"),
        ("--tokens 2 3", "--tokens must be a whole number from 16 up, got 2"),
        ("--size 500", "--size must be a multiple of 64 from 64 up, got 500"),
        ("--repeats 0", "--repeats must be a whole number from 1 up, got 0"),
        ("--method dog", "invalid choice: 'dog'"),
    ],
)
def test_what_does_not_fit_is_named(line: str, text: str, refused: Callable[..., str]) -> None:
    assert text in refused(speed.main, line.split())


def test_the_device_gives_the_defaults_and_what_is_asked_stays() -> None:
    gpu, cpu = speed.Benchmark(device="cuda", keep=["50"]), speed.Benchmark()
    assert gpu.fractions == [0.5]
    assert [(each.model, each.size) for each in gpu.settings()] == [
        ("sd15", 512),
        ("sd15", 1024),
        ("sdxl", 1024),
        ("sd15", 2048),
    ]
    assert (gpu.tokens, cpu.tokens) == ([4096], [4096])
    assert cpu.settings() == [Setting("sd15", 512, "cpu", torch.float32)]
