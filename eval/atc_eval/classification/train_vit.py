"""Training of the demo's small vision transformer on emoji, at first and further with reduced tokens."""

import copy

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from atc_eval.classification.emoji import SIZE, Emoji, normalize
from atc_eval.method import Method

SHIFT = 4  # pixels
FINETUNE_EPOCHS = 1
FINETUNE_RATE = 5e-4


def make_model(num_classes: int) -> VisionTransformer:
    """A transformer as deep as DeiT, so that it has the paper's stages; 8 x 8 patches."""
    torch.manual_seed(0)
    return VisionTransformer(
        img_size=SIZE, patch_size=6, embed_dim=64, depth=12, num_heads=2, num_classes=num_classes, drop_path_rate=0.05
    )


def augment(images: Tensor) -> Tensor:
    """Mirror half of the images, and shift all by up to four pixels."""
    mirrored = torch.where(torch.rand(len(images), 1, 1, 1) < 0.5, images, images.flip(3))
    padded = F.pad(mirrored, (SHIFT,) * 4, value=255)
    y, x = torch.randint(2 * SHIFT + 1, (2,)).tolist()
    return padded[:, :, y : y + SIZE, x : x + SIZE]


def train(model: nn.Module, emoji: Emoji, epochs: int, learning_rate: float, batch_size: int = 64) -> None:
    """Train `model` in place, with the same order of images in every run."""
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=0.05)
    batches = len(emoji.images) // batch_size
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, total_steps=epochs * batches, pct_start=0.15
    )
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
    model.eval()


def finetuned(model: VisionTransformer, emoji: Emoji, method: Method) -> VisionTransformer:
    """A copy of `model`, trained further with reduced tokens."""
    twin = copy.deepcopy(model)
    with method.applied(twin):
        train(twin, emoji, FINETUNE_EPOCHS, FINETUNE_RATE)
    return twin
