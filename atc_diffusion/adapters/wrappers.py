"""Modules inside others that wrap them: for checkpoints, sharding, data parallelism, compilation or adapters."""

from typing import Any

# Under which name a wrapper has its module: checkpoint_wrapper, FullyShardedDataParallel, torch.compile, and
# DistributedDataParallel and DataParallel. What `fully_shard` shards is of the same class as before.
_NAMES = ("_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_orig_mod", "module")


def unwrapped(module: Any) -> Any:
    """The module inside all wrappers, those of PEFT too, nested in any order."""
    if hasattr(module, "get_base_model"):
        return unwrapped(module.get_base_model())
    inside = (module._modules[name] for name in _NAMES if name in module._modules)  # scripted ones have no `get`
    inner = next((each for each in inside if each is not None), None)
    return module if inner is None else unwrapped(inner)


def without_wrappers(path: str) -> str:
    """The path of a module as it would be without wrappers."""
    return ".".join(name for name in path.split(".") if name not in _NAMES)
