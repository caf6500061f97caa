"""Which adapter serves a network. Adapters import diffusers' classes, so only the one that is needed is imported."""

import pkgutil
from functools import cache
from importlib.metadata import version

from packaging.version import Version
from torch import nn

from atc_diffusion.adapters import Family

# diffusers' class -> its adapter; of a network's classes the most derived one decides.
_ADAPTERS = {
    "FluxControlNetModel": "flux:FluxFamily",
    "FluxTransformer2DModel": "flux:FluxFamily",
    "ModelMixin": "unet:UNetFamily",
    "QwenImageControlNetModel": "qwen_image:QwenImageFamily",
    "QwenImageTransformer2DModel": "qwen_image:QwenImageFamily",
    "SD3ControlNetModel": "sd3:SD3Family",
    "SD3Transformer2DModel": "sd3:SD3Family",
    "ZImageTransformer2DModel": "z_image:ZImageFamily",
}
# Families whose networks or processors are made differently in earlier versions of diffusers.
_NEEDS_DIFFUSERS = {"qwen_image": Version("0.39"), "z_image": Version("0.39")}


def family_of(network: nn.Module) -> Family | None:
    """The adapter of a diffusers network or of a subclass of one; None for anything else.

    Raises:
        ValueError: if this version of diffusers is too old for it.
    """
    for kind in type(network).__mro__:
        if kind.__module__.startswith("diffusers.") and kind.__name__ in _ADAPTERS:
            return _load(_ADAPTERS[kind.__name__])
    return None


@cache
def _load(adapter: str) -> Family:
    module, _, _ = adapter.partition(":")
    if not is_supported(module):
        raise ValueError(
            f"{module} needs diffusers {_NEEDS_DIFFUSERS[module]} or newer, and this is {version('diffusers')}; run:"
            " pip install -U diffusers"
        )
    return pkgutil.resolve_name(f"atc_diffusion.adapters.{adapter}")()


def is_supported(module: str) -> bool:
    """Whether the installed diffusers is new enough for the adapter in `module`."""
    return Version(version("diffusers")).release >= _NEEDS_DIFFUSERS.get(module, Version("0")).release
