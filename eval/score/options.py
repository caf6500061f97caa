"""How pictures are scored, as the command line says it."""

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
from score.networks import LAYERS, RESIZERS
from score.scorer import Scorer


@dataclass(frozen=True)
class Scoring:
    """how they are scored"""

    reference: tuple[Path, ...] = option(
        "the reference pictures; eval/reference.py makes the paper's", default=(), parse=checks.pictures, metavar="DIR"
    )
    features: str = option(
        "network whose features are compared; weights of the second come with a package (default: %(default)s)",
        default="inception",
        choices=list(LAYERS),
    )
    inception_weights: Path | None = option(
        "torch-fidelity's Inception weights (default: downloaded)", default=None, parse=checks.file, metavar="FILE"
    )
    resize: str = option(
        "as in the original FID, or as clean-fid, which the paper used (default: %(default)s)",
        default="tensorflow",
        choices=list(RESIZERS),
    )
    bootstrap: int = option(
        "draws for the intervals (default: %(default)s)", default=200, parse=checks.whole(2), metavar="N"
    )
    lpips: bool = switch("LPIPS too, with AlexNet's weights, which are downloaded")

    def prepare(self, cache: Path, device: torch.device) -> Callable[[PictureSet], Scorer]:
        """A function that makes the scorer once the unmerged pictures are there; all else is loaded and read now.

        Raises:
            ValueError: if there are no reference pictures, some cannot be read, or weights are missing.
        """
        if not self.reference:
            raise ValueError(
                "--reference DIR is needed; eval/reference.py makes it from ImageNet's validation pictures"
            )
        features = Features(self.features, self.resize, cache, device, self.inception_weights)
        lpips = Lpips() if self.lpips else None
        return partial(Scorer, features, features(self.reference), bootstrap=self.bootstrap, lpips=lpips)
