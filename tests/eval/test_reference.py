"""The paper's reference pictures, from a made-up ImageNet of 1000 classes in both of its layouts."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from files import list_pictures
from reference import main
from score.reference import gather

COLORS = 7  # pictures of each class, of which five are wanted


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A picture for every place within a class."""
    folder = tmp_path_factory.mktemp("samples")
    paths = [folder / f"{number}.JPEG" for number in range(COLORS)]
    for number, path in enumerate(paths):
        Image.new("RGB", (8, 8), (30 * number, 0, 0)).save(path)
    return paths


@pytest.fixture
def by_class(tmp_path: Path, samples: list[Path]) -> Path:
    """A folder of class folders. Pictures of one class follow each other by name."""
    for index in range(1000):
        folder = tmp_path / "val" / f"n{index:08d}"
        folder.mkdir(parents=True)
        for place, sample in enumerate(samples):
            os.link(sample, folder / f"ILSVRC2012_val_{index * COLORS + place:08d}.JPEG")
    return tmp_path / "val"


@pytest.fixture
def flat(tmp_path: Path, samples: list[Path]) -> tuple[Path, Path]:
    """All pictures in one folder, the classes taking turns from 1000 down to 1, and the file that says so."""
    folder = tmp_path / "val"
    folder.mkdir()
    for number in range(1000 * COLORS):
        os.link(samples[number // 1000], folder / f"ILSVRC2012_val_{number + 1:08d}.JPEG")
    truth = tmp_path / "ground_truth.txt"
    truth.write_text("".join(f"{1000 - number % 1000}\n" for number in range(1000 * COLORS)))
    return folder, truth


def reds(folder: Path) -> list[int]:
    """The red of every picture, in units of 30: its place within its class."""
    reds = []
    for path in list_pictures(folder):
        with Image.open(path) as image:
            reds.append(round(np.asarray(image)[0, 0, 0] / 30))
    return reds


def replace(path: Path, data: bytes) -> None:
    path.unlink()  # else the other names of the same file would change with it
    path.write_bytes(data)


def test_class_folders_give_the_first_five_of_each(by_class: Path, tmp_path: Path) -> None:
    assert gather(by_class, None, tmp_path / "out") == []
    assert reds(tmp_path / "out") == [0, 1, 2, 3, 4] * 1000


def test_the_flat_layout_gives_the_first_five_of_each(flat: tuple[Path, Path], tmp_path: Path) -> None:
    gather(*flat, tmp_path / "out")
    assert reds(tmp_path / "out") == [0, 1, 2, 3, 4] * 1000


def test_pictures_are_copied_byte_for_byte(by_class: Path, tmp_path: Path) -> None:
    gather(by_class, None, tmp_path / "out")
    first, copy = list_pictures(by_class / "n00000000")[1], list_pictures(tmp_path / "out")[1]
    assert copy.name == f"0001_{first.name}"
    assert copy.read_bytes() == first.read_bytes()


def test_what_is_not_rgb_is_named_and_kept(by_class: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = list_pictures(by_class / "n00000007")[2]
    path.unlink()
    Image.new("L", (8, 8)).save(path)
    main(["--imagenet-val", str(by_class), "--out", str(tmp_path / "out")])
    assert f"5000 pictures in {tmp_path / 'out'}" in (said := capsys.readouterr().out)
    assert f"{path.name} (L)" in said
    assert len(list_pictures(tmp_path / "out")) == 5000


def test_an_unreadable_picture_is_named_and_nothing_is_written(by_class: Path, tmp_path: Path) -> None:
    path = list_pictures(by_class / "n00000007")[2]
    replace(path, path.read_bytes()[:300])
    with pytest.raises(ValueError, match=f"1 pictures are unreadable: {path.name}"):
        gather(by_class, None, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_unreadable_picture_that_is_not_wanted_does_not_matter(by_class: Path, tmp_path: Path) -> None:
    replace(list_pictures(by_class / "n00000007")[5], b"")
    gather(by_class, None, tmp_path / "out")
    assert len(list_pictures(tmp_path / "out")) == 5000


def test_missing_pictures_are_named(by_class: Path, tmp_path: Path) -> None:
    for path in list_pictures(by_class / "n00000123")[:3]:
        path.unlink()
    with pytest.raises(ValueError, match="1 classes have fewer than 5 pictures: n00000123 has 4"):
        gather(by_class, None, tmp_path / "out")


def test_a_missing_class_is_an_error(by_class: Path, tmp_path: Path) -> None:
    (by_class / "n00000123").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="found 999 classes instead of 1000"):
        gather(by_class, None, tmp_path / "out")


def test_the_ground_truth_must_be_of_these_pictures(flat: tuple[Path, Path], tmp_path: Path) -> None:
    folder, truth = flat
    list_pictures(folder)[0].unlink()
    with pytest.raises(ValueError, match=r"has 6999 pictures, but .* has 7000 lines"):
        gather(folder, truth, tmp_path / "out")


def test_a_folder_that_is_there_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(SystemExit, match=r"reference\.py: --out .*out already exists"):
        main(["--imagenet-val", str(tmp_path), "--out", str(tmp_path / "out")])
