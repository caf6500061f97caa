"""What is tried to find a setting for a model: merging of several strengths, its rivals, and both together."""

from dataclasses import replace
from importlib.util import find_spec

from atc_diffusion import ATCConfig
from draw.configuration import Configuration
from draw.rivals import Rival


def candidates(is_unet: bool) -> list[Configuration]:
    """The unmerged model, then what is tried, the most promising first."""
    fast = ATCConfig.fast()
    merges = [fast, ATCConfig.fast(0.25), replace(fast, r=0.5), ATCConfig.fast(0.05)]
    if is_unet:
        merges.append(replace(fast, levels="all"))
    steps = [Rival("steps", share) for share in (0.8, 0.7, 0.5)]
    ways = [Configuration(), *map(Configuration, merges), Configuration(fast, steps[0])]
    ways += [Configuration(rival=rival) for rival in steps]
    if is_unet and find_spec("DeepCache"):
        ways += [Configuration(rival=Rival("deepcache", 2)), Configuration(fast, Rival("deepcache", 2))]
    return ways
