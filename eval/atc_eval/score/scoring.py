"""The options of scoring."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from transformers.hf_argparser import HfArg

from atc_eval.checks import check_file, check_folder, check_number
from atc_eval.draw.image_set import ImageSet
from atc_eval.files import FEWEST_IMAGES, list_images
from atc_eval.score.image_features import Features
from atc_eval.score.scorer import Scorer
from atc_eval.score.similarity import Lpips


@dataclass(frozen=True)
class Scoring:
    """How images are scored."""

    _argument_group_name = "scoring"
    reference: Path | None = HfArg(
        default=None, help="folder of the reference images; eval/reference.py makes the paper's"
    )
    features: Literal["inception", "efficientnet-lite0"] = HfArg(
        default="inception", help="network whose features are compared"
    )
    inception_weights: Path | None = HfArg(default=None, help="torch-fidelity's weights (default: downloaded)")
    resize: Literal["clean", "tensorflow"] = HfArg(
        default="clean", help="clean: as in clean-fid and the paper; tensorflow: as for the original FID"
    )
    bootstrap: int = HfArg(default=200, help="bootstrap draws for the intervals")
    lpips: bool = HfArg(default=False, help="LPIPS too, with AlexNet's weights, which are downloaded")

    def __post_init__(self) -> None:
        check_folder("--reference", self.reference)
        check_file("--inception-weights", self.inception_weights)
        check_number("--bootstrap", self.bootstrap, least=2)
        if self.reference and (count := len(list_images(self.reference))) < FEWEST_IMAGES:
            raise ValueError(f"{self.reference} has {count} images; at least {FEWEST_IMAGES} are needed")

    def prepare(self, cache: Path, device: torch.device) -> Callable[[ImageSet], Scorer]:
        """A function that makes the scorer from the unmerged set; everything else is loaded now.

        Raises:
            ValueError: if reference images are missing or unreadable, or weights are missing.
        """
        if self.reference is None:
            raise ValueError(
                "--reference DIR is needed; eval/reference.py makes it from ImageNet's validation images; or try --demo"
            )
        features = Features(self.features, self.resize, cache, device, self.inception_weights)
        lpips = Lpips() if self.lpips else None
        return partial(Scorer, features, features(list_images(self.reference)), bootstrap=self.bootstrap, lpips=lpips)
