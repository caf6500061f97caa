"""The demo's task: emoji of three vendors, classified into Unicode's nine groups by a small vision transformer.

All drawings of an emoji are either training pictures or test pictures: no tested emoji was seen in training, drawn by
anybody.
"""

import copy
import json
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from classify_scores import Task
from classify_ways import Way
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset
from tqdm import tqdm

SIZE = 48  # pixels
SHIFT = 4
VENDORS = {  # package, its folder of pictures, their suffix
    "noto": ("emoji-datasource-google@16.0.0", "img/google/64", "png"),
    "twemoji": ("emoji-datasource-twitter@16.0.0", "img/twitter/64", "png"),
    "fluent": ("@lobehub/fluent-emoji-3d@1.1.0", "assets", "webp"),
}
SHOWN = ("1F98A", "1F354", "1F69C")  # fox, hamburger and tractor: test pictures, shown as the last vendor drew them
FINETUNE_EPOCHS = 1
FINETUNE_RATE = 5e-4


@dataclass(frozen=True)
class Pictures:
    """Pictures with their classes.

    Attributes:
        images: `[n, 3, H, W]` uint8.
        classes: `[n]` int64.
        subjects: `[n]` int64, which emoji each shows, whoever drew it.
    """

    images: Tensor
    classes: Tensor
    subjects: Tensor

    def __getitem__(self, chosen: Tensor) -> "Pictures":
        return Pictures(self.images[chosen], self.classes[chosen], self.subjects[chosen])


def demo_task(folder: Path, weights: Path, epochs: int) -> Task:
    """The test pictures, and the model of `weights`, trained first if there is none."""
    training, test = load_emoji(folder)
    model = make_model(num_classes=int(training.classes.max()) + 1)
    if not weights.exists():
        train(model, training, epochs, learning_rate=2e-3)
        torch.save(model.state_dict(), weights)
    model.load_state_dict(torch.load(weights))
    last_drawn = {number: index for index, number in enumerate(test.subjects.tolist())}
    return Task(
        name=f"ViT of 12 blocks, 64 channels and 8 x 8 patches, {len(training.images)} emoji to train and "
        f"{len(test.images)} to test, nine classes",
        model=model,
        pictures=TensorDataset(normalize(test.images), test.classes),
        subjects=test.subjects.numpy(),
        shown=[last_drawn[subject(name)] for name in SHOWN if subject(name) in last_drawn],
        visible=lambda image: (image.permute(1, 2, 0).numpy() + 1) / 2,
        finetune=lambda way: finetuned(model, training, way),
    )


def load_emoji(folder: Path) -> tuple[Pictures, Pictures]:
    """The pictures to train and those to test."""
    listed = _listed(folder)
    groups = sorted({emoji["category"] for emoji in listed})
    found = [
        (file, groups.index(emoji["category"]), subject(emoji["unified"]))
        for emoji in listed
        for vendor, (_, images, suffix) in VENDORS.items()
        if (file := folder / vendor / images / Path(emoji["image"]).with_suffix(f".{suffix}")).is_file()
    ]
    files, classes, subjects = zip(*found, strict=True)
    images = torch.stack([draw_on_white(file) for file in tqdm(files, desc="reading", unit="picture")])
    pictures = Pictures(images, torch.tensor(classes), torch.tensor(subjects))
    is_test = pictures.subjects % 4 == 0
    return pictures[~is_test], pictures[is_test]


def subject(code_points: str) -> int:
    """The number of an emoji, which does not depend on what others there are."""
    return zlib.crc32(code_points.encode())


def _listed(folder: Path) -> list[dict[str, str]]:
    """All emoji with a group, as the packages list them."""
    missing = [vendor for vendor, (_, images, _) in VENDORS.items() if not (folder / vendor / images).is_dir()]
    if missing:
        package = VENDORS[missing[0]][0]
        archive = package.replace("@lobehub/", "lobehub-").replace("@", "-") + ".tgz"
        target = folder / missing[0]
        raise ValueError(
            f"--emoji-pictures {folder} lacks {', '.join(missing)}; for {missing[0]}: npm pack {package} && "
            f"mkdir -p {target} && tar xf {archive} -C {target} --strip-components 1"
        )
    listed = json.loads((folder / "twemoji" / "emoji.json").read_text())
    return [emoji for emoji in listed if emoji["category"] != "Component"]


def draw_on_white(file: Path) -> Tensor:
    """The picture `[3, H, W]` uint8."""
    with Image.open(file) as image:
        picture = image.convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    drawn = Image.alpha_composite(white, picture).convert("RGB").resize((SIZE, SIZE), Image.Resampling.LANCZOS)
    return torch.frombuffer(bytearray(drawn.tobytes()), dtype=torch.uint8).view(SIZE, SIZE, 3).permute(2, 0, 1)


def make_model(num_classes: int) -> VisionTransformer:
    """As deep as DeiT, so that the paper's stages fit; 8 x 8 patches."""
    torch.manual_seed(0)
    return VisionTransformer(
        img_size=SIZE, patch_size=6, embed_dim=64, depth=12, num_heads=2, num_classes=num_classes, drop_path_rate=0.05
    )


def normalize(images: Tensor) -> Tensor:
    return images.float() / 127.5 - 1


def augment(images: Tensor) -> Tensor:
    """Mirror half of the pictures, and move all by up to four pixels."""
    mirrored = torch.where(torch.rand(len(images), 1, 1, 1) < 0.5, images, images.flip(3))
    padded = F.pad(mirrored, (SHIFT,) * 4, value=255)
    y, x = torch.randint(2 * SHIFT + 1, (2,)).tolist()
    return padded[:, :, y : y + SIZE, x : x + SIZE]


def train(model: nn.Module, pictures: Pictures, epochs: int, learning_rate: float, batch_size: int = 64) -> None:
    """Train `model` in place, in an order that is the same every time."""
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=0.05)
    batches = len(pictures.images) // batch_size
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, total_steps=epochs * batches, pct_start=0.15
    )
    model.train()
    for _ in tqdm(range(epochs), desc="training", unit="epoch"):
        for batch in torch.randperm(len(pictures.images)).split(batch_size)[:batches]:
            logits = model(normalize(augment(pictures.images[batch])))
            loss = F.cross_entropy(logits, pictures.classes[batch], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    model.eval()


def finetuned(model: VisionTransformer, pictures: Pictures, way: Way) -> VisionTransformer:
    """A copy of `model`, trained further with its tokens reduced."""
    twin = copy.deepcopy(model)
    with way.applied(twin):
        train(twin, pictures, FINETUNE_EPOCHS, FINETUNE_RATE)
    return twin
