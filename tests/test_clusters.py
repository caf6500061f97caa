"""Pictures of what was merged, and of the run that merged it."""

import sys
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

import clusters
from atc_diffusion import ATCConfig, ToMeConfig, patched, summary
from comparison import Comparison, Settings, Studio
from form import PRESETS, configure
from overlay import Partition, at_step, paint, partitions
from pipeline import EMOJI, load

SETTINGS = Settings("fox", seed=0, steps=2, size=64, config=ATCConfig(r=0.25))


@pytest.fixture(scope="module")
def studio() -> Studio:
    return Studio(load(EMOJI), guidance_scale=3.0)


def test_clusters_are_painted_in_their_mean_colour_with_lines_between_them():
    picture = Image.new("RGB", (64, 64), (200, 100, 0))
    picture.paste((100, 200, 0), (0, 0, 16, 64))
    labels = np.array([[0, 0, 0, 1]] * 4, dtype=np.int32)  # the first cluster holds both colours, 1 : 2
    pixels = np.asarray(paint(picture, labels, side=64), dtype=int)
    assert pixels.shape == (64, 64, 3)
    assert np.abs(pixels[:, :40] - pixels[0, 0]).max() == 0
    assert pixels[0, 0] == pytest.approx([167, 133, 0], abs=2)
    assert pixels[0, -1] == pytest.approx([200, 100, 0], abs=2)
    assert (pixels[:, 47] != pixels[:, 0]).any()


def test_the_partition_of_a_step_is_the_newest_until_then():
    found = [Partition("layer", "queries", step, np.zeros((2, 2), np.int32)) for step in (0, 3, 6)]
    assert [at_step(found, step).step for step in (0, 2, 3, 5, 19)] == [0, 0, 3, 3, 6]


@pytest.mark.parametrize(
    ("config", "tokens", "kept"),
    [
        (ATCConfig(r=0.25), "all tokens", 0.25),
        (ATCConfig(r=1, r_keys=0.1), "keys and values", 0.1),
        (ToMeConfig(r=0.5), "all tokens", 0.5),
    ],
)
def test_every_merged_layer_has_its_partition(studio, config, tokens, kept):
    with patched(studio.pipe, replace(config, record=True)):
        studio.pipe("fox", height=64, width=64, num_inference_steps=1)
        found, layers = partitions(studio.pipe), [f"unet.{layer.name}" for layer in summary(studio.pipe).layers]
    assert [(each.layer, each.tokens, each.step) for each in found] == [(layer, tokens, 0) for layer in layers]
    for labels, sizes in ((each.labels, each.sizes) for each in found):
        height, width = labels.shape
        assert height == width
        assert len(sizes) == round(kept * labels.size)
        assert sizes.min() > 0


def test_a_comparison_draws_both_and_names_every_step(studio):
    steps = []
    comparison = studio.compare(SETTINGS, lambda *step: steps.append(step))
    assert steps == [(name, done) for name in ("Unmerged", "Merged") for done in range(3)]
    assert 15 < comparison.psnr < 100
    assert 0.5 < comparison.ssim < 1
    assert 128 <= np.percentile(comparison.difference, 99.9) <= 255
    assert set(np.unique(comparison.difference)) <= {min(255, error * comparison.gain) for error in range(256)}
    assert {partition.step for partition in comparison.partitions} <= {0, 1}


def test_equal_pictures_have_no_difference():
    picture = Image.new("RGB", (64, 64), "red")
    comparison = Comparison(SETTINGS, picture, picture, 2.0, 1.0, 0.0, [])
    assert (comparison.ratio, comparison.psnr, comparison.ssim) == (0.5, float("inf"), 1)
    assert not np.asarray(comparison.difference).any()


def test_a_run_that_fails_leaves_the_pipeline_as_it_was(studio):
    def fail(name: str, done: int) -> None:
        if (name, done) == ("Merged", 1):
            raise RuntimeError("cancelled")

    with pytest.raises(RuntimeError, match="cancelled"):
        studio.compare(SETTINGS, fail)
    with pytest.raises(ValueError, match="not patched"):
        summary(studio.pipe)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("shares", [(1, 0.25), (0.5, 0.5)])
def test_the_line_of_code_makes_the_configuration(preset, shares):
    config = configure(preset, *shares)
    names = {"apply_patch": lambda pipe, config: config, "pipe": None, "ATCConfig": ATCConfig, "ToMeConfig": ToMeConfig}
    assert eval(replace(SETTINGS, config=config).code, names) == config


def test_clusters_writes_a_picture_and_a_histogram_for_each_layer_and_step(tmp_path, monkeypatch):
    options = "--method atc-average tome --keep 25 10 --steps 2 --size 64 --at 1 --layers down_blocks.0.attentions.1"
    run_clusters(monkeypatch, *options.split(), "--out", str(tmp_path))
    layer = "unet.down_blocks.0.attentions.1.transformer_blocks.0.attn1"
    written = sorted(path.name for path in tmp_path.iterdir())
    assert written == [f"{layer}_step1_{kind}.png" for kind in ("clusters", "sizes")]
    assert all(Image.open(tmp_path / name).width > 500 for name in written)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--keep", "0"], "above 0 and below 100, got 0"),
        (["--keep", "100"], "above 0 and below 100, got 100"),
        (["--method", "tome", "--keep", "10"], "--keep 10: ToMe with stride 2 keeps at least 0.25 of the tokens"),
        (["--model", "/nonexistent"], "there is no folder /nonexistent"),
        (["--steps", "4", "--at", "4"], "--at counts the steps from 0 to 3, got 4"),
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--layers", "mid"], r"--layers mid fits none of unet\.down_blocks\.0"),
    ],
)
def test_clusters_says_what_does_not_fit(tmp_path, monkeypatch, options, message):
    with pytest.raises(ValueError, match=message):
        run_clusters(monkeypatch, *options, "--out", str(tmp_path))
    assert not list(tmp_path.iterdir())


def run_clusters(monkeypatch: pytest.MonkeyPatch, *options: str) -> None:
    monkeypatch.setattr(sys, "argv", ["clusters.py", *options])
    clusters.main()
