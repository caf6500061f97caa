"""A self-attention of a network, which may be inside modules that wrap others.

These serve checkpoints, sharding, data parallelism, compilation or adapters.
"""

from dataclasses import dataclass
from typing import Any

from torch import nn

# Under which name a wrapper has its module: checkpoint_wrapper, FullyShardedDataParallel, torch.compile, and
# DistributedDataParallel and DataParallel. What `fully_shard` shards is of the same class as before.
_NAMES = ("_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_orig_mod", "module")


@dataclass(frozen=True)
class Layer:
    """One self-attention that can be merged.

    Attributes:
        name: its path in the network.
        block: the transformer block that contains it.
        attention: the module that receives the tokens `[B, N, C]`.
        level: the downsampling factor of its grid of tokens, relative to the latents.
        channels: `C`.
    """

    name: str
    block: nn.Module
    attention: nn.Module
    level: int
    channels: int

    @classmethod
    def within(cls, block: nn.Module, path: str, name: str, level: int) -> "Layer":
        """The attention called `name` in the transformer block at `path`, which wrappers may be around."""
        block = unwrapped(block)
        attention = unwrapped(getattr(block, name))
        path = ".".join(part for part in path.split(".") if part not in _NAMES)
        return cls(f"{path}.{name}", block, attention, level, attention.query_dim)

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width of its grid of tokens, for latents of `size` (height, width)."""
        height, width = size
        return -(-height // self.level), -(-width // self.level)


def unwrapped(module: Any) -> Any:
    """The module inside all wrappers, those of PEFT too, nested in any order."""
    if hasattr(module, "get_base_model"):
        return unwrapped(module.get_base_model())
    inside = (module._modules[name] for name in _NAMES if name in module._modules)  # scripted ones have no `get`
    inner = next((each for each in inside if each is not None), None)
    return module if inner is None else unwrapped(inner)
