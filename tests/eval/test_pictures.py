"""The pictures of an experiment, and that a set holds only whole pictures of its own."""

import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image

from draw.picture_set import PictureSet, claim_folder
from draw.pictures import Picture, plan, select_classes

NAMES = [f"thing {number}" for number in range(12)]
PICTURES = plan(NAMES, [3, 11], 2, "a {}.", seed=100)
IMAGE = Image.effect_noise((32, 32), 50).convert("RGB")


def make_set(folder: Path, **origin: object) -> PictureSet:
    return PictureSet(folder, PICTURES, {"model": "tiny", **origin})


def full_set(folder: Path) -> PictureSet:
    pictures = make_set(folder)
    for picture in PICTURES:
        pictures.save(picture, IMAGE)
    return pictures


def test_prompt_and_seed_are_those_of_the_authors_code() -> None:
    pictures = plan(NAMES, [3, 11], 2, "a {}.", seed=100)
    assert pictures == [
        Picture(3, 0, "a thing 3.", 130),
        Picture(3, 1, "a thing 3.", 131),
        Picture(11, 0, "a thing 11.", 210),
        Picture(11, 1, "a thing 11.", 211),
    ]


@pytest.mark.parametrize(("text", "classes"), [("all", [0, 1, 2, 3, 4]), ("2", [0, 1]), ("4,1", [4, 1]), ("3,", [3])])
def test_classes_are_all_a_count_or_a_list(text: str, classes: list[int]) -> None:
    assert select_classes(text, 5) == classes


@pytest.mark.parametrize("text", ["6", "0", "-2", "5,", "1,1", "-1,0", "some", ",", ""])
def test_classes_that_are_not_there_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=f"classes.*{text!r}"):
        select_classes(text, 5)


def test_a_saved_picture_is_whole_and_no_longer_missing(tmp_path: Path) -> None:
    pictures = make_set(tmp_path / "set")
    assert pictures.missing() == PICTURES
    pictures.save(PICTURES[1], IMAGE)
    assert pictures.missing() == [PICTURES[0], *PICTURES[2:]]
    assert pictures.load(PICTURES[1]).tobytes() == IMAGE.tobytes()
    assert [path.name for path in pictures.folder.iterdir()] == ["0003_1.png"]


def flip_a_bit(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


@pytest.mark.parametrize(
    "damage", [lambda data: b"", lambda data: data[: len(data) // 3], lambda data: data[:-5], flip_a_bit]
)
def test_a_damaged_picture_is_missing(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    pictures = full_set(tmp_path)
    path = pictures.paths[2]
    path.write_bytes(damage(path.read_bytes()))
    assert pictures.missing() == [PICTURES[2]]


def test_a_picture_of_other_settings_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    full_set(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="model: 'tiny' there, 'other' now"):
        make_set(tmp_path, model="other").missing()
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_another_picture_in_a_pictures_place_is_refused(tmp_path: Path) -> None:
    pictures = full_set(tmp_path)
    pictures.paths[0].write_bytes(pictures.paths[1].read_bytes())
    with pytest.raises(ValueError, match="seed: 131 there, 130 now"):
        pictures.missing()
    IMAGE.save(pictures.paths[0])
    with pytest.raises(ValueError, match=r"0003_0\.png was not made with these settings"):
        pictures.missing()


def test_other_files_are_not_of_the_set(tmp_path: Path) -> None:
    pictures = full_set(tmp_path)
    (tmp_path / ".0003_0.png.17.tmp").write_bytes(b"half a picture")
    IMAGE.save(tmp_path / "9999_0.png")
    assert pictures.missing() == []
    assert [path.name for path in pictures.paths] == ["0003_0.png", "0003_1.png", "0011_0.png", "0011_1.png"]


def test_a_write_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    pictures = full_set(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with file_size_limit(100), pytest.raises(OSError, match=r"File too large: .*0003_0\.png"):
        pictures.save(PICTURES[0], Image.effect_noise((64, 64), 50).convert("RGB"))
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_folder_keeps_its_settings(tmp_path: Path) -> None:
    claim_folder(tmp_path / "out", {"steps": 20, "model": "tiny"}, write=True)
    claim_folder(tmp_path / "out", {"steps": 20, "model": "tiny"}, write=False)
    with pytest.raises(ValueError, match=r"other settings \(steps: 20 there, 50 now\)"):
        claim_folder(tmp_path / "out", {"steps": 50, "model": "tiny"}, write=True)


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Lets no file grow beyond `size` bytes, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
