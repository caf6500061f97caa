"""Features: torch-fidelity's own networks, resizing, weights that are checked, and a cache by content."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torchvision.transforms.functional import pil_to_tensor

from atc_eval.files import list_images
from atc_eval.score import features
from atc_eval.score.features import (
    EfficientNetLite0,
    Features,
    InceptionV3,
    find_inception_weights,
    resize_clean,
    resize_tensorflow,
)

CPU = torch.device("cpu")
Draw = Callable[..., Path]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights for torch-fidelity's Inception, in a file; its constructor insists on loading some."""
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        patch.setattr(torch, "load", lambda *args, **kwargs: None)
        network = FeatureExtractorInceptionV3("random", ["2048"], feature_extractor_weights_path="none")
    torch.save(network.state_dict(), path)
    return path


def test_inception_gives_torch_fidelitys_features(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "find_inception_weights", str)
    theirs = FeatureExtractorInceptionV3("theirs", ["2048"], feature_extractor_weights_path=weights)
    ours = InceptionV3(weights)
    images = torch.randint(256, (2, 3, 40, 30), dtype=torch.uint8)
    resized = torch.stack([resize_tensorflow(image, 299) for image in images])
    torch.testing.assert_close(ours(resized), theirs(images)[0], rtol=1e-5, atol=1e-6)


def test_weights_with_another_hash_are_refused(weights: Path) -> None:
    with pytest.raises(ValueError, match=r"has SHA-256 .*, but torch-fidelity's Inception weights have 6726825d"):
        find_inception_weights(weights)


def test_weights_with_the_right_hash_are_taken(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "INCEPTION_SHA256", hashlib.sha256(weights.read_bytes()).hexdigest()[:8])
    assert find_inception_weights(weights) == str(weights)


def test_weights_that_are_not_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"inception-weights .*nothing\.pth is no file; download it from https://"):
        find_inception_weights(tmp_path / "nothing.pth")


def test_offline_it_says_what_to_fetch_and_where_to_put_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(features, "URL_INCEPTION_V3", "http://127.0.0.1:9/weights.pth")  # nobody listens there
    with pytest.raises(ValueError, match=rf"download http://127.*put it at {tmp_path}/checkpoints/weights-inception"):
        find_inception_weights()


def test_a_download_of_something_else_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "page.html").write_text("Please log in.")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(features, "URL_INCEPTION_V3", (tmp_path / "page.html").as_uri())
    with pytest.raises(ValueError, match=r"cannot download the Inception weights \(invalid hash value .*elsewhere"):
        find_inception_weights()


def test_tensorflow_resizing_takes_every_other_pixel_of_twice_the_size() -> None:
    image = torch.randint(256, (3, 20, 20), dtype=torch.uint8)
    torch.testing.assert_close(resize_tensorflow(image, 10), image[:, ::2, ::2].float(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("size", [10, 60])
def test_clean_resizing_is_pils_bicubic_without_its_rounding(size: int) -> None:
    image = torch.randint(64, 192, (3, 40, 40), dtype=torch.uint8)  # so that no overshoot is cut off
    resized = resize_clean(image, size)
    rounded = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((size, size), Image.Resampling.BICUBIC)
    assert not torch.equal(resized, resized.round())
    # PIL rounds after each of the two directions, and the first rounding passes the second's weights, at most 1.27.
    torch.testing.assert_close(resized, pil_to_tensor(rounded).float(), rtol=0, atol=0.5 + 0.5 * 1.27 + 0.01)


@pytest.mark.parametrize("resize", [resize_tensorflow, resize_clean])
def test_resizing_to_the_same_size_changes_nothing(resize: Callable[[torch.Tensor, int], torch.Tensor]) -> None:
    image = torch.randint(256, (3, 12, 12), dtype=torch.uint8)
    torch.testing.assert_close(resize(image, 12), image.float(), rtol=0, atol=1e-3)


def test_the_packaged_network_classifies_by_these_features() -> None:
    network = EfficientNetLite0().eval()
    images = torch.randint(256, (2, 3, 224, 224)).float()
    pooled = network(images)
    torch.testing.assert_close(network.network._fc(pooled), network.network((images - 127) / 128))


def test_features_do_not_depend_on_the_batch_that_an_image_is_in(draw_images: Draw, tmp_path: Path) -> None:
    paths = list_images(draw_images("images", 5))
    compute = Features("efficientnet-lite0", "clean", tmp_path / "cache", CPU)
    torch.testing.assert_close(compute(paths)[3:], compute(paths[3:]), rtol=1e-4, atol=1e-5)


def test_images_of_several_sizes_make_one_set(draw_images: Draw, tmp_path: Path) -> None:
    paths = list_images(draw_images("small", 2)) + list_images(draw_images("large", 2, size=40))
    for resize in ("clean", "tensorflow"):
        assert Features("efficientnet-lite0", resize, tmp_path / "cache", CPU)(paths).shape == (4, 1280)


def test_features_are_computed_once_for_the_same_content(
    draw_images: Draw, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = draw_images("images", 4)
    compute = Features("efficientnet-lite0", "tensorflow", tmp_path / "cache", CPU)
    first = compute(list_images(folder))
    monkeypatch.setattr(Features, "_compute", lambda *_: pytest.fail("computed again"))
    folder = folder.rename(tmp_path / "moved")
    os.utime(folder / "0.png", (0, 0))
    assert torch.equal(compute(list_images(folder)), first)


def test_other_content_resizing_or_order_is_recomputed(draw_images: Draw, tmp_path: Path) -> None:
    paths = list_images(draw_images("images", 4))
    tensorflow, clean = (
        Features("efficientnet-lite0", each, tmp_path / "cache", CPU) for each in ("tensorflow", "clean")
    )
    first = tensorflow(paths)
    assert torch.equal(tensorflow(paths[::-1]), first.flip(0))
    assert not torch.equal(clean(paths), first)
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(paths[0])
    changed = tensorflow(paths)
    assert torch.equal(changed[1:], first[1:])
    assert not torch.equal(changed[0], first[0])
    assert len(list((tmp_path / "cache").iterdir())) == 4
