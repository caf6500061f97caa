"""The two tasks: ImageNet with a model of timm's, and emoji with a small model that is trained first."""

from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from torch.utils.data import TensorDataset
from torchvision.datasets import ImageFolder

from arguments import checks
from arguments.options import option
from classification.emoji import SHOWN, Pictures, load_emoji, normalize, subject
from classification.evaluation import Task
from classification.training import finetuned, make_model, train
from draw.picture_set import claim_folder

DEIT = "deit_small_patch16_224"
NUM_SHOWN = 3


@dataclass(frozen=True)
class ImageNetTask:
    """ImageNet"""

    imagenet_val: Path | None = option("validation pictures, one folder for each class", None, checks.folder)
    model: str = option("a VisionTransformer of timm's", DEIT)
    weights: Path | None = option("of the model (default: downloaded)", None, checks.file)

    def make(self, out: Path) -> Task:
        if self.imagenet_val is None:
            raise ValueError(
                "--imagenet-val DIR is needed: ILSVRC2012's 50 000 validation pictures, in one folder for each of the"
                " 1000 classes; or use --demo"
            )
        model = load_model(self.model, self.weights)
        data = timm.data.resolve_model_data_config(model)
        pictures = ImageFolder(str(self.imagenet_val), timm.data.create_transform(**data))
        if len(pictures.classes) != model.num_classes:
            found = f"{self.imagenet_val} has {len(pictures.classes)} folders"
            raise ValueError(f"{found}, but {self.model} has {model.num_classes} classes")
        mean, deviation = torch.tensor(data["mean"]), torch.tensor(data["std"])
        task = Task(
            name=f"{self.model}, {len(pictures)} ImageNet validation pictures",
            model=model,
            pictures=pictures,
            subjects=torch.arange(len(pictures)).numpy(),
            shown=list(range(0, len(pictures), -(-len(pictures) // NUM_SHOWN))),
            visible=lambda image: (image.permute(1, 2, 0) * deviation + mean).clamp(0, 1).numpy(),
        )
        claim_folder(out, {"task": task.name, "weights": str(self.weights)}, write=True)
        return task


def load_model(name: str, weights: Path | None) -> torch.nn.Module:
    if not timm.is_model(name):
        raise ValueError(f"--model {name} is not one of timm's; see timm.list_models('*vit*')")
    try:
        return timm.create_model(name, pretrained=weights is None, checkpoint_path=str(weights or ""))
    except Exception as error:  # the hub's errors are of many kinds
        raise ValueError(
            f"no weights for {name} ({type(error).__name__}); download timm/{name} from the Hugging Face hub elsewhere"
            " and give its model.safetensors by --weights"
        ) from error


@dataclass(frozen=True)
class DemoTask:
    """demo"""

    emoji_pictures: Path = option("folder of the three packages", Path("out/emoji"), Path)
    epochs: int = option("of training", 16, checks.whole(1))

    def make(self, out: Path) -> Task:
        """The test pictures, and the model in `out`, which is trained first if missing."""
        claim_folder(out, {"demo": "emoji", "epochs": self.epochs}, write=True)
        training, test = load_emoji(self.emoji_pictures)
        return _emoji_task(training, test, out / "model.pt", self.epochs)


def _emoji_task(training: Pictures, test: Pictures, weights: Path, epochs: int) -> Task:
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
