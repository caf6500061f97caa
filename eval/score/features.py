"""Features of sets of pictures, cached by content."""

import hashlib
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torch_fidelity.utils import create_feature_extractor, get_featuresdict_from_dataset
from torchvision.transforms.functional import pil_to_tensor

from files import picture_mode, write_atomically
from score.networks import LAYERS, RESIZERS, find_inception_weights


class Features:
    """Features of sets of pictures by one network and one way of resizing, computed once for each set.

    Args:
        network: "inception" or "efficientnet-lite0".
        resize: "tensorflow" or "clean".
        cache: folder of the features, named by the content of the pictures.
        device: where the network runs.
        inception_weights: torch-fidelity's weights file. None: the downloaded file; it is downloaded if missing.

    Raises:
        ValueError: if the weights are missing or wrong.
    """

    def __init__(
        self, network: str, resize: str, cache: Path, device: torch.device, inception_weights: Path | None = None
    ) -> None:
        weights = find_inception_weights(inception_weights) if network == "inception" else None
        cuda = device.type == "cuda"
        self.network = create_feature_extractor(
            network, [LAYERS[network]], cuda=cuda, verbose=False, feature_extractor_weights_path=weights
        )
        self.resize = resize
        self.cache = cache
        self.cuda = cuda

    @property
    def name(self) -> str:
        """Network and resizing, as reports name them."""
        return f"{self.network.get_name()}, {self.resize} resizing"

    def __call__(self, paths: Sequence[Path]) -> Tensor:
        """Features `[n, C]` of the pictures at `paths`, in this order.

        Raises:
            ValueError: naming the pictures that cannot be read.
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

    def _compute(self, paths: Sequence[Path]) -> Tensor:
        dataset = ResizedPictures(paths, RESIZERS[self.resize], self.network.size)
        try:
            features = get_featuresdict_from_dataset(
                dataset, self.network, batch_size=32, cuda=self.cuda, save_cpu_ram=not self.cuda, verbose=False
            )
        except (OSError, SyntaxError) as error:
            unreadable = ", ".join(str(path) for path in paths if picture_mode(path) is None)
            raise ValueError(f"unreadable pictures: {unreadable or error}") from error
        return features[LAYERS[self.network.get_name()]]


class ResizedPictures(Dataset[Tensor]):
    """Pictures `[3, size, size]` in 0..255 from files."""

    def __init__(self, paths: Sequence[Path], resize: Callable[[Tensor, int], Tensor], size: int) -> None:
        self.paths = paths
        self.resize = resize
        self.size = size

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        with Image.open(self.paths[index]) as image:
            return self.resize(pil_to_tensor(image.convert("RGB")), self.size)
