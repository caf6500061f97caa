"""The demonstration's reference: emoji by name, on white, in the model's size."""

from pathlib import Path

import numpy as np
import pytest
from demo import draw_reference
from PIL import Image


def test_emoji_are_found_by_name_and_drawn_on_white(tmp_path: Path) -> None:
    emoji = Image.new("RGBA", (256, 256), (0, 0, 0, 0))
    emoji.paste((255, 0, 0, 255), (64, 64, 192, 192))
    for name in ("1f34e", "2764-fe0f"):
        emoji.save(tmp_path / f"{name}.webp", lossless=True)
    folder = draw_reference(["red apple", "red heart"], tmp_path, tmp_path / "out")
    assert sorted(path.name for path in folder.iterdir()) == ["red apple.png", "red heart.png"]
    pixels = np.asarray(Image.open(folder / "red apple.png"))
    assert pixels.shape == (64, 64, 3)
    assert pixels[0, 0].tolist() == [255, 255, 255]
    assert pixels[32, 32].tolist() == [255, 0, 0]


def test_without_the_pictures_it_says_how_to_get_them(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"lacks 1 of 1 pictures, such as 1f34e\.webp; .* npm pack @lobehub"):
        draw_reference(["red apple"], tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
