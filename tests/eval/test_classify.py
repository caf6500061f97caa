"""The classification experiment, end to end on a few drawn images."""

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.models import register_model
from timm.models.vision_transformer import VisionTransformer

import classify
from atc_diffusion import ViTConfig
from atc_eval.classification import demo
from atc_eval.classification.accuracy import cluster_labels
from atc_eval.classification.evaluation import Reductions, mean_by_subject
from atc_eval.method import Method
from atc_eval.score.statistics import bootstrap_draws

GROUPS = ("Animals & Nature", "Food & Drink")


@register_model
def vit_of_this_test(**options: object) -> VisionTransformer:
    model = VisionTransformer(img_size=16, patch_size=4, embed_dim=8, depth=10, num_heads=2, num_classes=2)
    model.pretrained_cfg = {"input_size": (3, 16, 16)}
    return model


@pytest.fixture
def emoji(tmp_path: Path) -> Path:
    """The three packages' folders, each with 40 emoji: red animals and green food."""
    folder = tmp_path / "emoji"
    listed = [
        {"unified": "1F98A" if n == 0 else f"{n:x}", "image": f"{n:x}.png", "category": GROUPS[n % 2]}
        for n in range(40)
    ]
    for vendor, (_, images, suffix) in demo.VENDORS.items():
        (folder / vendor / images).mkdir(parents=True)
        (folder / vendor / "emoji.json").write_text(json.dumps(listed))
        for n in range(40):
            color = (220, 30, 30, 255) if n % 2 == 0 else (30, 200, 30, 255)
            image = Image.new("RGBA", (16, 16))
            image.paste(color, (n % 7, n % 5, 12, 14))
            image.save(folder / vendor / images / f"{n:x}.{suffix}", lossless=True)
    return folder


@pytest.fixture
def imagenet(tmp_path: Path) -> Path:
    """Two classes of three images, and a model's weights beside them."""
    for name in ("n01", "n02"):
        (tmp_path / "val" / name).mkdir(parents=True)
        for i in range(3):
            noise = np.random.default_rng(i).integers(0, 255, (16, 16, 3), np.uint8)
            Image.fromarray(noise).save(tmp_path / "val" / name / f"{i}.png")
    torch.save(vit_of_this_test().state_dict(), tmp_path / "weights.pt")
    return tmp_path


@pytest.mark.slow
def test_demo_trains_evaluates_and_reports(emoji, tmp_path):
    arguments = ["--demo", "--emoji-images", str(emoji), "--epochs", "1", "--out", str(tmp_path / "out")]
    arguments += ["--method", "atc", "tome", "--linkage", "average", "--keep", "50"]
    classify.main(arguments)
    report = (tmp_path / "out" / "report.md").read_text()
    assert "| ViTConfig() over the best merging |" in report
    files = [file.name for file in (tmp_path / "out").iterdir()]
    assert {"clusters-1.svg", "results.csv", "report.html", "model.safetensors"} <= set(files)


def test_a_rerun_reads_what_is_there(imagenet):
    out = imagenet / "out"
    arguments = ["--imagenet-val", str(imagenet / "val"), "--weights", str(imagenet / "weights.pt"), "--out", str(out)]
    arguments += ["--model", "vit_of_this_test", "--method", "topk", "--keep", "25", "--remove", "1", "--device", "cpu"]
    classify.main(arguments)
    file = out / "methods" / f"{Method(ViTConfig(method='topk', r=0.25)).folder}.json"
    record = json.loads(file.read_text())
    assert len(record["correct"]) == 6
    file.write_text(json.dumps(record | {"correct": [1, 1, 1, 0, 0, 0]}))
    classify.main(arguments)
    assert "| ViTConfig(method='topk') | 50.0 ±" in (out / "report.md").read_text()
    assert "linear, t = 1" in (out / "report.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--keep", "50/10"], "--keep: expected percentages of tokens kept, such as 50, got '50/10'"),
        ([], r"--imagenet-val DIR is needed: .* or use --demo"),
        (
            ["--demo", "--emoji-images", "nowhere"],
            "lacks noto, twemoji, fluent; for noto: npm pack emoji-datasource-g",
        ),
    ],
)
def test_what_is_missing_is_said_in_one_sentence(arguments, message, tmp_path, refused):
    assert re.search(message, refused(classify.main, [*arguments, "--out", str(tmp_path)]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--weights", "nowhere.pt"],
            "there is no file nowhere.pt",
        ),
        (["--weights", __file__], r"--weights \S+test_classify\.py holds no weights of vit_of_this_test"),
        (["--model", "vit_of_nobody"], "--model vit_of_nobody is not one of timm's"),
    ],
)
def test_models_that_are_not_there(imagenet, arguments, message, refused):
    common = ["--imagenet-val", str(imagenet / "val"), "--model", "vit_of_this_test", "--out", str(imagenet / "out")]
    assert re.search(message, refused(classify.main, [*common, *arguments]))


def test_every_method_at_every_reduction_that_it_can_do():
    given: dict[str, Any] = {"keep": ["25", "50"], "remove": [8], "schedule": ["linear"]}
    methods = Reductions(method=["atc", "tome"], linkage=["average", "single"], **given).methods()
    rows = [(each.label, each.setting) for each in methods]
    settings = ("25 %", "50 %", "linear, t = 8")
    assert rows == [
        ("unmerged", ""),
        *(("ViTConfig()", each) for each in settings),
        *(("ViTConfig(linkage='single')", each) for each in settings),
        *(("ViTConfig(method='tome')", each) for each in settings[1:]),
    ]
    assert len({each.folder for each in methods}) == len(methods)


def test_intervals_count_images_of_one_subject_as_one():
    values = np.random.default_rng(0).random(50)
    thrice, subjects = np.repeat(values, 3), np.repeat(np.arange(50), 3)
    draws = bootstrap_draws(50, 300)
    single, triple = mean_by_subject(values, np.arange(50), draws), mean_by_subject(thrice, subjects, draws)
    assert triple.margin == pytest.approx(single.margin)
    assert single.margin == pytest.approx(1.96 * values.std() / 50**0.5, rel=0.15)


def test_clusters_are_read_from_the_features():
    torch.manual_seed(0)
    labels = cluster_labels(vit_of_this_test().eval(), Method(ViTConfig(r=0.5)), torch.randn(3, 16, 16))
    assert [(each.shape, len(np.unique(each))) for each in labels] == [((4, 4), count) for count in (8, 4, 2)]
    for finer, coarser in pairwise(labels):
        assert all(len(np.unique(coarser[finer == label])) == 1 for label in np.unique(finer))
