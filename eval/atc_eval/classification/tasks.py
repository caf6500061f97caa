"""The two tasks: ImageNet with a model of timm's, and emoji with a small model that is trained first."""

from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from torch.utils.data import TensorDataset
from torchvision.datasets import ImageFolder
from transformers.hf_argparser import HfArg

from atc_eval.checks import check_file, check_folder, check_number
from atc_eval.classification.emoji import SHOWN, Emoji, load_emoji, normalize, subject
from atc_eval.classification.evaluation import Task
from atc_eval.classification.train_vit import finetuned, make_model, train
from atc_eval.draw.image_set import claim_folder

DEIT = "deit_small_patch16_224"
NUM_SHOWN = 3
RESULTS = "methods/*.json"


@dataclass(frozen=True)
class ImageNetTask:
    """A model of timm's on ImageNet."""

    _argument_group_name = "ImageNet"
    imagenet_val: Path | None = HfArg(default=None, help="validation images, in one folder for each class")
    model: str = HfArg(default=DEIT, help="a VisionTransformer of timm's")
    weights: Path | None = HfArg(default=None, help="weights of the model (default: downloaded)")

    def __post_init__(self) -> None:
        check_folder("--imagenet-val", self.imagenet_val)
        check_file("--weights", self.weights)

    def make(self, out: Path) -> Task:
        if self.imagenet_val is None:
            raise ValueError(
                "--imagenet-val DIR is needed: ILSVRC2012's 50 000 validation images, in one folder for each of the"
                " 1000 classes; or use --demo"
            )
        model = load_model(self.model, self.weights)
        data = timm.data.resolve_model_data_config(model)
        folder = ImageFolder(str(self.imagenet_val), timm.data.create_transform(**data))
        if len(folder.classes) != model.num_classes:
            found = f"{self.imagenet_val} has {len(folder.classes)} folders"
            raise ValueError(f"{found}, but {self.model} has {model.num_classes} classes")
        mean, deviation = torch.tensor(data["mean"]), torch.tensor(data["std"])
        task = Task(
            name=f"{self.model}, {len(folder)} ImageNet validation images",
            model=model,
            images=folder,
            subjects=torch.arange(len(folder)).numpy(),
            shown=list(range(0, len(folder), -(-len(folder) // NUM_SHOWN))),
            visible=lambda image: (image.permute(1, 2, 0) * deviation + mean).clamp(0, 1).numpy(),
        )
        claim_folder(out, {"task": task.name, "weights": str(self.weights)}, RESULTS)
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
        return _emoji_task(training, test, out / "model.pt", self.epochs)


def _emoji_task(training: Emoji, test: Emoji, weights: Path, epochs: int) -> Task:
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
        images=TensorDataset(normalize(test.images), test.classes),
        subjects=test.subjects.numpy(),
        shown=[last_drawn[subject(name)] for name in SHOWN if subject(name) in last_drawn],
        visible=lambda image: (image.permute(1, 2, 0).numpy() + 1) / 2,
        finetune=lambda method: finetuned(model, training, method),
    )
