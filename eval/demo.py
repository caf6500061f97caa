"""The experiment in small, with the emoji model of this repository: no download, no GPU."""

from pathlib import Path
from typing import Any

import emoji
from PIL import Image

EMOJI_DIFFUSION = Path(__file__).resolve().parents[1] / "examples" / "emoji_diffusion"
SIZE = 64

DEFAULTS: dict[str, Any] = {
    "model": str(EMOJI_DIFFUSION),
    "class_names": EMOJI_DIFFUSION / "things.txt",
    "prompt": "{}",
    "size": SIZE,
    "steps": 20,
    "guidance": 3.0,
    "batch_size": 4,
    "keep": [90, 75, 60, 50, 40, 25, 15, 10],
    "method": ["tome", "atc"],
    "linkage": ["average", "single", "complete"],
    "features": "efficientnet-lite0",
    "out": Path("out/demo"),
}


def draw_reference(names: list[str], pictures: Path, out: Path) -> Path:
    """Draw the emoji called `names` on white, in the model's size, to the folder `out`, which is returned.

    Args:
        names: English emoji names, such as "red apple".
        pictures: folder of Microsoft's Fluent emoji, one file for each, named by its code points.

    Raises:
        ValueError: if a picture is not there.
    """
    sources = [pictures / f"{_code_points(name)}.webp" for name in names]
    missing = [source for source in sources if not source.is_file()]
    if missing:
        raise ValueError(
            f"--emoji-pictures {pictures} lacks {len(missing)} of {len(names)} pictures, such as {missing[0].name}; to "
            "have them: npm pack @lobehub/fluent-emoji-3d@1.1.0 && tar xf lobehub-fluent-emoji-3d-1.1.0.tgz, "
            "then --emoji-pictures package/assets"
        )
    out.mkdir(parents=True, exist_ok=True)
    for name, source in zip(names, sources, strict=True):
        draw_on_white(source).save(out / f"{name}.png")
    return out


def draw_on_white(path: Path) -> Image.Image:
    """The emoji at `path` as the model was trained on it."""
    with Image.open(path) as image:
        picture = image.convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(white, picture).convert("RGB").resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def _code_points(name: str) -> str:
    return "-".join(f"{ord(character):x}" for character in emoji.emojize(f":{name.replace(' ', '_')}:"))
