"""The images of an experiment, and that a set holds only whole images of its own."""

import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image

from atc_diffusion import ATCConfig
from atc_eval.draw.images import PlannedImage, plan, select_classes
from atc_eval.draw.sets import ImageSet, check_folder_settings, claim_folder, complete_sets, make_sets
from atc_eval.files import write_json
from atc_eval.method import Method

NAMES = [f"thing {number}" for number in range(12)]
PLAN = plan(NAMES, [3, 11], 2, "a {}.", seed=100)
IMAGE = Image.effect_noise((32, 32), 50).convert("RGB")


def make_set(folder: Path, **origin: object) -> ImageSet:
    return ImageSet(folder, PLAN, {"model": "tiny", "way": Method().json, **origin})


def full_set(folder: Path) -> ImageSet:
    images = make_set(folder)
    for image in PLAN:
        images.save(image, IMAGE)
    return images


def test_prompt_and_seed_are_those_of_the_authors_code() -> None:
    images = plan(NAMES, [3, 11], 2, "a {}.", seed=100)
    assert images == [
        PlannedImage(3, 0, "a thing 3.", 130),
        PlannedImage(3, 1, "a thing 3.", 131),
        PlannedImage(11, 0, "a thing 11.", 210),
        PlannedImage(11, 1, "a thing 11.", 211),
    ]


@pytest.mark.parametrize(("text", "classes"), [("all", [0, 1, 2, 3, 4]), ("2", [0, 1]), ("4,1", [4, 1]), ("3,", [3])])
def test_classes_are_all_a_count_or_a_list(text: str, classes: list[int]) -> None:
    assert select_classes(text, 5) == classes


@pytest.mark.parametrize("text", ["6", "0", "-2", "5,", "1,1", "-1,0", "some", ",", ""])
def test_classes_that_are_not_there_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=f"classes.*{text!r}"):
        select_classes(text, 5)


def test_a_saved_image_is_whole_and_no_longer_missing(tmp_path: Path) -> None:
    images = make_set(tmp_path / "set")
    assert images.missing() == PLAN
    images.save(PLAN[1], IMAGE)
    assert images.missing() == [PLAN[0], *PLAN[2:]]
    assert images.load(PLAN[1]).tobytes() == IMAGE.tobytes()
    assert [path.name for path in images.folder.iterdir()] == ["0003_1.png"]


def flip_a_bit(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


@pytest.mark.parametrize(
    "damage", [lambda data: b"", lambda data: data[: len(data) // 3], lambda data: data[:-5], flip_a_bit]
)
def test_a_damaged_image_is_missing(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    images = full_set(tmp_path)
    path = images.paths[2]
    path.write_bytes(damage(path.read_bytes()))
    assert images.missing() == [PLAN[2]]


def test_an_image_of_other_settings_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    full_set(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="drawn with other settings \\(model: 'tiny', now 'other'\\)"):
        make_set(tmp_path, model="other").missing()
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_another_image_in_an_images_place_is_refused(tmp_path: Path) -> None:
    images = full_set(tmp_path)
    images.paths[0].write_bytes(images.paths[1].read_bytes())
    with pytest.raises(ValueError, match="seed: 131, now 130"):
        images.missing()
    IMAGE.save(images.paths[0])
    with pytest.raises(ValueError, match=r"0003_0\.png was drawn with other settings"):
        images.missing()


def test_other_files_are_not_of_the_set(tmp_path: Path) -> None:
    images = full_set(tmp_path)
    (tmp_path / ".0003_0.png.17.tmp").write_bytes(b"half an image")
    IMAGE.save(tmp_path / "9999_0.png")
    assert images.missing() == []
    assert [path.name for path in images.paths] == ["0003_0.png", "0003_1.png", "0011_0.png", "0011_1.png"]


def test_a_write_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    images = full_set(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with file_size_limit(100), pytest.raises(OSError, match=r"File too large: .*0003_0\.png"):
        images.save(PLAN[0], Image.effect_noise((64, 64), 50).convert("RGB"))
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_folder_keeps_its_settings_once_it_holds_results(tmp_path: Path) -> None:
    claim_folder(tmp_path, {"steps": 20, "model": "tiny"}, "sets/*/*.png")
    claim_folder(tmp_path, {"steps": 25, "model": "tiny"}, "sets/*/*.png")
    full_set(tmp_path / "sets" / "unmerged")
    check_folder_settings(tmp_path, {"steps": 25, "model": "tiny"}, "sets/*/*.png")
    with pytest.raises(ValueError, match=r"was begun with other settings \(steps: 25, now 50\); give another --out"):
        claim_folder(tmp_path, {"steps": 50, "model": "tiny"}, "sets/*/*.png")


def test_settings_that_an_older_version_had_not_are_read_as_what_it_did(tmp_path: Path) -> None:
    way = Method(ATCConfig(r=0.5)).json
    older = {name: value for name, value in way["merge"].items() if name != "widen_heads"}
    old = ImageSet(tmp_path / "sets" / "atc-50", PLAN, {"model": "tiny", "way": {**way, "merge": older}})
    for image in PLAN:
        old.save(image, IMAGE)
    now = {"model": "tiny", "lora": None, "scheduler": None}
    assert ImageSet(old.folder, PLAN, now | {"way": way}).missing() == []
    with pytest.raises(ValueError, match="lora: None, now 'another'"):
        ImageSet(old.folder, PLAN, now | {"way": way, "lora": "another"}).missing()
    write_json(tmp_path / "settings.json", {"model": "tiny"})
    claim_folder(tmp_path, now, "sets/*/*.png")
    sets = make_sets(tmp_path, [Method(), Method(ATCConfig(r=0.5))], PLAN, now)
    assert [images.folder.name for images in sets.values()] == ["unmerged", "atc-50"]  # the folder that is there
    other = ImageSet(tmp_path / "sets" / "other", PLAN, {"way": {"merge": {"kind": "OtherConfig"}, "rival": None}})
    for folder, origin in {"other": other.origin, "foreign": {"model": "tiny"}}.items():
        ImageSet(tmp_path / "sets" / folder, PLAN, origin).save(PLAN[0], IMAGE)
    with pytest.warns(UserWarning, match="sets/other is left out: this version has no OtherConfig"):
        assert list(complete_sets(tmp_path, PLAN, now)) == [Method(ATCConfig(r=0.5))]


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Lets no file grow beyond `size` bytes, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
