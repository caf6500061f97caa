"""The demo's data and model: emoji of three vendors, classified into Unicode's groups by a small vision transformer.

An emoji is either in the training pictures or in the test pictures, in all vendors' drawings: the classifier never saw a
tested emoji, drawn by anybody.
"""

import json
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

SIZE = 48  # pixels
VENDORS = {
    "noto": ("emoji-datasource-google@16.0.0", "img/google/64", "png"),
    "twemoji": ("emoji-datasource-twitter@16.0.0", "img/twitter/64", "png"),
    "fluent": ("@lobehub/fluent-emoji-3d@1.1.0", "assets", "webp"),
}
HOW_TO_GET = "to have them: " + " && ".join(
    f"mkdir -p emoji/{vendor} && npm pack {package} && tar xf {package.replace('@', '').replace('/', '-', 1)}"
    for vendor, (package, _, _) in VENDORS.items()
)


@dataclass(frozen=True)
class Pictures:
    """Pictures with their classes.

    Attributes:
        images: `[n, 3, H, W]` uint8.
        classes: `[n]` int64.
        emoji: `[n]` int64, which emoji each shows, whoever drew it.
    """

    images: Tensor
    classes: Tensor
    emoji: Tensor

    def __getitem__(self, chosen: Tensor) -> "Pictures":
        return Pictures(self.images[chosen], self.classes[chosen], self.emoji[chosen])


def load_emoji(folder: Path) -> tuple[Pictures, Pictures, list[str]]:
    """Training pictures, test pictures and the names of the classes."""
    listed = [emoji for emoji in _listed(folder) if emoji["category"] != "Component"]
    groups = sorted({emoji["category"] for emoji in listed})
    found = [
        (file, groups.index(emoji["category"]), number)
        for number, emoji in enumerate(listed)
        for vendor, (_, images, suffix) in VENDORS.items()
        if (file := folder / vendor / images / Path(emoji["image"]).with_suffix(f".{suffix}")).is_file()
    ]
    images = torch.stack([_draw(file) for file, _, _ in tqdm(found, desc="reading", unit="picture")])
    pictures = Pictures(images, *(torch.tensor(column) for column in list(zip(*found, strict=True))[1:]))
    is_test = torch.tensor([zlib.crc32(listed[number]["unified"].encode()) % 4 == 0 for _, _, number in found])
    return pictures[~is_test], pictures[is_test], groups


def _listed(folder):
    return json.loads((folder / "twemoji" / "emoji.json").read_text())


def _draw(file: Path) -> Tensor:
    with Image.open(file) as image:
        picture = image.convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    drawn = Image.alpha_composite(white, picture).convert("RGB").resize((SIZE, SIZE), Image.Resampling.LANCZOS)
    return torch.frombuffer(bytearray(drawn.tobytes()), dtype=torch.uint8).view(SIZE, SIZE, 3).permute(2, 0, 1)


def make_model(num_classes: int) -> VisionTransformer:
    """Depth and stages as in DeiT, 8 x 8 patches."""
    torch.manual_seed(0)
    return VisionTransformer(
        img_size=SIZE, patch_size=6, embed_dim=64, depth=12, num_heads=2, num_classes=num_classes, drop_path_rate=0.05
    )


def normalize(images: Tensor) -> Tensor:
    return images.float() / 127.5 - 1


def augment(images: Tensor) -> Tensor:
    """Mirror half of the pictures, and move each by up to four pixels."""
    mirrored = torch.where(torch.rand(len(images), 1, 1, 1) < 0.5, images, images.flip(3))
    padded = F.pad(mirrored, (4, 4, 4, 4), value=255)
    y, x = torch.randint(9, (2,)).tolist()
    return padded[:, :, y : y + SIZE, x : x + SIZE]


def train(model: nn.Module, pictures: Pictures, epochs: int, learning_rate: float, batch_size: int = 64, test=None) -> None:
    """Train `model` in place; the same seed gives the same batches."""
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=0.05)
    steps = epochs * (len(pictures.images) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.15)
    model.train()
    import time; t0=time.time()
    for e in range(epochs):
        for batch in torch.randperm(len(pictures.images)).split(batch_size)[: len(pictures.images) // batch_size]:
            logits = model(normalize(augment(pictures.images[batch])))
            loss = F.cross_entropy(logits, pictures.classes[batch], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        if test is not None:
            model.eval()
            with torch.no_grad():
                acc=torch.cat([model(normalize(i)).argmax(1) for i in test.images.split(256)]).eq(test.classes).float().mean()
            model.train(); print(e, loss.item(), acc.item(), time.time()-t0, flush=True)
    model.eval()
