"""The options of scoring."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from arguments import checks
from arguments.options import option, switch
from draw.picture_set import PictureSet
from score.features import Features
from score.nearness import Lpips
from score.networks import NETWORKS, RESIZERS
from score.scorer import Scorer


@dataclass(frozen=True)
class Scoring:
    """scoring"""

    reference: tuple[Path, ...] = option(
        "folder of the reference pictures; eval/reference.py makes the paper's", (), checks.pictures, nargs=None
    )
    features: str = option("network whose features are compared", "inception", choices=NETWORKS)
    inception_weights: Path | None = option("torch-fidelity's (default: downloaded)", None, checks.file)
    resize: str = option(
        "as for the original FID, or as in clean-fid (the paper)", "tensorflow", choices=list(RESIZERS)
    )
    bootstrap: int = option("bootstrap draws for the intervals", 200, checks.whole(2))
    lpips: bool = switch("LPIPS too, with AlexNet's weights, which are downloaded")

    def prepare(self, cache: Path, device: torch.device) -> Callable[[PictureSet], Scorer]:
        """A function that makes the scorer from the unmerged set; everything else is loaded now.

        Raises:
            ValueError: if reference pictures are missing or unreadable, or weights are missing.
        """
        if not self.reference:
            raise ValueError(
                "--reference DIR is needed; eval/reference.py makes it from ImageNet's validation pictures"
            )
        features = Features(self.features, self.resize, cache, device, self.inception_weights)
        lpips = Lpips() if self.lpips else None
        return partial(Scorer, features, features(self.reference), bootstrap=self.bootstrap, lpips=lpips)
