"""Images of what was merged, and of the run that merged it."""

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

import app
import clusters
from atc_diffusion import ATCConfig, ToMeConfig, patched, summary
from atc_diffusion.painting import paint_clusters
from comparison import Comparison, Settings, Studio
from display import PRESETS, configure
from pipeline import EMOJI, Partition, at_step, load, partitions

SETTINGS = Settings("fox", 0, 2, 64, ATCConfig(r=0.25), "apply_patch(pipe, ATCConfig(r=0.25))")


@pytest.fixture(scope="module")
def studio() -> Studio:
    return Studio(load(EMOJI), guidance_scale=3.0)


def test_the_largest_clusters_are_coloured_and_all_else_stays_as_it_is():
    image = Image.new("RGB", (8, 8), (200, 100, 0))
    labels = np.array([[0, 0, 0, 1], [2, 2, 3, 3], [4, 5, 6, 7], [8, 9, 10, 11]])
    pixels = np.asarray(paint_clusters(image, labels, side=64, most=2), dtype=int)
    assert pixels.shape == (64, 64, 3)
    kept = np.abs(pixels - [200, 100, 0]).max(axis=2) == 0
    assert not kept[:15, :48].any()  # the row of the largest
    assert not kept[17:31, :31].any()
    assert kept[:31, 48:].all()  # a single token
    assert kept[33:].all()
    colours = {tuple(pixels[y, x]) for y, x in [(4, 4), (4, 40), (20, 4)]}
    assert len(colours) == 2
    assert (pixels[15, :48] == 255).all()  # the outline


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


def test_equal_images_have_no_difference():
    image = Image.new("RGB", (64, 64), "red")
    comparison = Comparison(SETTINGS, image, image, 2.0, 1.0, 0.0, [])
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
@pytest.mark.parametrize("fractions", [(1, 0.25), (0.5, 0.5), (1, 0.125)])
def test_the_code_makes_the_configuration(preset, fractions):
    if "ToMe" in preset and min(fractions) < 0.25:
        with pytest.raises(ValueError, match="ToMe with stride 2 keeps at least"):
            configure(preset, *fractions)
        return
    config, code = configure(preset, *fractions)
    imports, _, call = code.partition("\n\n")
    names: dict[str, Any] = {"pipe": None}
    exec(imports, names)
    made = eval(call, names | {"apply_patch": lambda pipe, config: config})
    assert made == config
    assert (config.r, config.r_keys or config.r) == fractions


def test_clusters_writes_an_image_for_each_layer_and_step(tmp_path):
    options = "--method atc-average tome --r 0.25 --steps 2 --size 64 --at 1 1 --layers down_blocks.0.attentions.1"
    clusters.main([*options.split(), "--out", str(tmp_path)])
    [written] = tmp_path.iterdir()
    assert written.name == "unet.down_blocks.0.attentions.1.transformer_blocks.0.attn1_step1.png"
    assert Image.open(written).width > 1000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--r", "0"], r"in \(0, 1\], got 0.0"),
        (["--r", "1"], "--r 1 keeps every token"),
        (["--r", "25"], "did you mean 0.25"),
        (["--method", "tome", "--r", "0.1"], "ToMe with stride 2 keeps at least 0.25 of the tokens"),
        (["--model", "/nonexistent"], "there is no folder /nonexistent"),
        (["--steps", "4", "--at", "4"], "--at counts the steps from 0 to 3, got 4"),
        (["--steps", "0"], "--steps must be a whole number from 1 up, got 0"),
        (["--size", "-8"], "--size must be a multiple of 8 from 8 up, got -8"),
        (["--guidance", "nan"], "--guidance must be a finite number, got nan"),
        (["--seed", str(-(2**64))], f"--seed must fit into 64 bits, got -{2**64}"),
        (["--out", f"{__file__}/x"], r"--out \S+/x cannot be made, because \S+test_clusters\.py is a file"),
        (["--layers", "mid"], r"--layers mid fits none of unet\.down_blocks\.0"),
    ],
)
def test_clusters_says_what_does_not_fit(tmp_path, refused, options, message):
    assert re.search(message, refused(clusters.main, ["--out", str(tmp_path), *options]))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "0"], "--steps must be a whole number from 1 to 1000, got 0"),
        (["--steps", "1001"], "--steps must be a whole number from 1 to 1000, got 1001"),
        (["--size", "0"], "--size must be a multiple of 8 from 16 to 4096, got 0"),
        (["--size", "-8"], "--size must be a multiple of 8 from 16 to 4096, got -8"),
        (["--size", "100"], "--size must be a multiple of 8 from 16 to 4096, got 100"),
        (["--size", "8192"], "--size must be a multiple of 8 from 16 to 4096, got 8192"),
        (["--guidance", "inf"], "--guidance must be a finite number, got inf"),
        (["--port", "70000"], "--port must be a whole number from 1 to 65535, got 70000"),
    ],
)
def test_the_page_is_not_served_with_what_does_not_fit(monkeypatch, refused, options, message):
    monkeypatch.setattr(app, "serve", lambda args: pytest.fail("the page was served"))
    assert message in refused(app.main, options)


def test_a_fraction_that_rounds_to_every_token_is_named(tmp_path, refused):
    options = ["--r", "0.9999", "--steps", "1", "--size", "64", "--out", str(tmp_path)]
    assert "--r 0.9999 merges no token of an image of this size" in refused(clusters.main, options)
