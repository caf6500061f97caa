"""Features of sets of images, cached by content."""

import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms.functional import pil_to_tensor

from atc_eval.files import image_mode, load_image, write_atomically
from atc_eval.score.feature_networks import RESIZERS, make_network


class Features:
    """Features of sets of images by one network and one way of resizing, computed once for each set.

    Args:
        network: "inception" or "efficientnet-lite0".
        resize: "tensorflow" or "clean".
        cache: folder of the features, named by the content of the images.
        device: where the network runs.
        inception_weights: torch-fidelity's weights file. None: the downloaded file; it is downloaded if missing.

    Raises:
        ValueError: if the weights are missing or wrong.
    """

    def __init__(
        self, network: str, resize: str, cache: Path, device: torch.device, inception_weights: Path | None = None
    ) -> None:
        self.network = make_network(network, inception_weights).to(device)
        self.name = f"{network}, {resize} resizing"  # as reports name it
        self.load = partial(load_images, RESIZERS[resize], self.network.size)
        self.cache = cache
        self.device = device

    def __call__(self, paths: Sequence[Path]) -> Tensor:
        """Features `[n, C]` of the images at `paths`, in this order.

        Raises:
            ValueError: naming the images that cannot be read.
        """
        path = self.cache / f"{self._digest(paths)}.npy"
        if not path.exists():
            file = BytesIO()
            np.save(file, self._compute(paths).numpy())
            write_atomically(path, file.getvalue())
        return torch.from_numpy(np.load(path))

    def _digest(self, paths: Sequence[Path]) -> str:
        digest = hashlib.sha256(self.name.encode())
        for path in paths:
            digest.update(hashlib.sha256(path.read_bytes()).digest())
        return digest.hexdigest()[:32]

    @torch.no_grad()
    def _compute(self, paths: Sequence[Path]) -> Tensor:
        workers = 4 if self.device.type == "cuda" else 0
        loader: Any = DataLoader(paths, batch_size=32, collate_fn=self.load, num_workers=workers)  # type: ignore[arg-type]
        try:
            return torch.cat([self.network(images.to(self.device)).cpu() for images in loader])
        except (OSError, SyntaxError) as error:
            unreadable = ", ".join(str(path) for path in paths if image_mode(path) is None)
            raise ValueError(f"unreadable images: {unreadable or error}") from error


def load_images(resize: Callable[[Tensor, int], Tensor], size: int, paths: Sequence[Path]) -> Tensor:
    """The images at `paths` as `[B, 3, size, size]` in 0..255."""
    return torch.stack([resize(pil_to_tensor(load_image(path)), size) for path in paths])
