"""The reference images, from a made-up ImageNet of three classes in both of its layouts."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from atc_eval.files import list_images
from reference import gather, main

CLASSES, IMAGES = 3, 7  # images of each class, of which five are wanted


@pytest.fixture(autouse=True)
def _few_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reference.NUM_CLASSES", CLASSES)


@pytest.fixture
def by_class(tmp_path: Path) -> Path:
    """A folder of class folders; the red of an image is 30 times its place within its class."""
    for index in range(CLASSES):
        folder = tmp_path / "val" / f"n{index}"
        folder.mkdir(parents=True)
        for place in range(IMAGES):
            Image.new("RGB", (8, 8), (30 * place, 0, 0)).save(folder / f"val_{index * IMAGES + place:02d}.JPEG")
    return tmp_path / "val"


@pytest.fixture
def flat(tmp_path: Path) -> tuple[Path, Path]:
    """All images in one folder, the classes taking turns from last to first, and the file with their classes."""
    (tmp_path / "val").mkdir()
    for number in range(CLASSES * IMAGES):
        Image.new("RGB", (8, 8), (30 * (number // CLASSES), 0, 0)).save(tmp_path / "val" / f"val_{number:02d}.JPEG")
    truth = tmp_path / "ground_truth.txt"
    truth.write_text("".join(f"{CLASSES - number % CLASSES}\n" for number in range(CLASSES * IMAGES)))
    return tmp_path / "val", truth


def places(folder: Path) -> list[int]:
    """The place of each image within its class."""
    return [round(np.asarray(Image.open(path))[0, 0, 0] / 30) for path in list_images(folder)]


def test_class_folders_give_the_first_five_of_each(by_class: Path, tmp_path: Path) -> None:
    assert gather(by_class, None, tmp_path / "out") == []
    assert places(tmp_path / "out") == [0, 1, 2, 3, 4] * CLASSES
    first, copy = list_images(by_class / "n0")[1], list_images(tmp_path / "out")[1]
    assert copy.name == f"0001_{first.name}"
    assert copy.read_bytes() == first.read_bytes()


def test_the_flat_layout_gives_the_first_five_of_each(flat: tuple[Path, Path], tmp_path: Path) -> None:
    gather(*flat, tmp_path / "out")
    assert places(tmp_path / "out") == [0, 1, 2, 3, 4] * CLASSES


def test_the_flat_layout_without_ground_truth_is_refused_with_the_option_and_the_file(
    flat: tuple[Path, Path], tmp_path: Path, refused: Callable[..., str]
) -> None:
    said = refused(main, ["--imagenet-val", str(flat[0]), "--out", str(tmp_path / "out")])
    assert "val holds 21 images and no class folders" in said
    assert "--ground-truth ILSVRC2012_validation_ground_truth.txt" in said
    assert not (tmp_path / "out").exists()


def test_images_that_are_not_rgb_are_named_and_kept(
    by_class: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("L", (8, 8)).save(by_class / "n1" / "val_09.JPEG")
    main(["--imagenet-val", str(by_class), "--out", str(tmp_path / "out")])
    assert "15 images in" in (printed := capsys.readouterr().out)
    assert "val_09.JPEG (L)" in printed
    assert len(list_images(tmp_path / "out")) == 15


def test_an_unreadable_image_is_named_if_it_is_wanted(by_class: Path, tmp_path: Path) -> None:
    (by_class / "n1" / "val_12.JPEG").write_bytes(b"")  # the sixth
    gather(by_class, None, tmp_path / "out")
    path = by_class / "n1" / "val_09.JPEG"
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(ValueError, match=r"unreadable images: val_09\.JPEG"):
        gather(by_class, None, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_missing_images_and_classes_are_named(by_class: Path, tmp_path: Path) -> None:
    for path in list_images(by_class / "n1")[:3]:
        path.unlink()
    with pytest.raises(ValueError, match="every class needs at least 5 images, but n1 has 4"):
        gather(by_class, None, tmp_path / "out")
    (by_class / "n1").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="expected 3 classes, found 2"):
        gather(by_class, None, tmp_path / "out")


def test_the_ground_truth_must_belong_to_these_images(flat: tuple[Path, Path], tmp_path: Path) -> None:
    list_images(flat[0])[0].unlink()
    with pytest.raises(ValueError, match=r"has 20 images, but .* has 21 lines"):
        gather(*flat, tmp_path / "out")


@pytest.mark.parametrize("content", [b"n01440764\nn01443537\n", b"\xff\xfe\x00", b"PK\x00\x01"])
def test_a_ground_truth_of_something_else_is_named(flat: tuple[Path, Path], tmp_path: Path, content: bytes) -> None:
    flat[1].write_bytes(content)
    with pytest.raises(ValueError, match=r"ground_truth\.txt must hold one class on each line, a number, like ILSVRC"):
        gather(*flat, tmp_path / "out")


def test_a_folder_that_exists_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(SystemExit, match=r"reference\.py: --out .*out already exists"):
        main(["--imagenet-val", str(tmp_path), "--out", str(tmp_path / "out")])
