"""Configuration of merging, with validation."""

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Literal, get_args

from torch import Tensor
from typing_extensions import Self

from atc_diffusion.clustering import check_member
from atc_diffusion.clustering.tree import Cuttable
from atc_diffusion.validation import (
    as_counts,
    check_flag,
    check_fraction,
    check_not_negative,
    check_options,
    check_takes_one,
    did_you_mean,
    is_count,
    is_number,
)

Fraction = float | Callable[[float], float]
Fractions = Fraction | Mapping[int, Fraction]
Levels = Literal["finest", "costly", "all"]
Features = Literal["keys", "values", "keys_values", "hidden_states"]

ALIGNMENT = 8  # keys: what tensor cores work best with
FEWEST_ALIGNED = 64  # tokens from which the rounding changes a fraction by less than a sixteenth


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """Choices of a user: names wrong arguments, documents all its fields, and prints as code."""

    def __new__(cls, *args: object, **options: object) -> Self:
        if args:
            hint = did_you_mean(args[0], "r=")
            raise ValueError(f"{cls.__name__} takes its options by name, such as r=0.6, got {args[0]!r}{hint}")
        check_options(cls.__name__, [each.name for each in fields(cls)], options)
        for each in fields(cls):
            if isinstance(each.default, bool):
                check_flag(each.name, options.get(each.name, each.default))
        return super().__new__(cls)

    def __init_subclass__(cls) -> None:
        """List the inherited fields in the docstring, which is all that `help` shows, and every default."""
        _, inherited, base_after = _sections(cls.__base__)
        before, own, after = _sections(cls)
        entries = [
            f"    {name} (default: {getattr(cls, name)!r}):\n        {text}" for name, text in (inherited | own).items()
        ]
        cls.__doc__ = "\n".join([before, "\nAttributes:", *entries, "", after or base_after])

    def __str__(self) -> str:
        """Python code for this configuration, without the choices that are left at their defaults."""
        options = []
        for each in fields(self):
            value = getattr(self, each.name)
            if value != each.default or (each.name == "r" and value is not None):
                options.append(f"{each.name}={value!r}")
        return f"{type(self).__name__}({', '.join(options)})"


def _sections(kind: type | None) -> tuple[str, dict[str, str], str]:
    """A docstring's text before its attributes, the attributes without their defaults, and the text after them."""
    before, _, rest = inspect.cleandoc((kind and kind.__doc__) or "").partition("\n\nAttributes:\n")
    attributes, _, after = rest.partition("\n\n")
    return before, dict(re.findall(r"^    (\w+)(?: \(default: .*\))?:\s+(.*(?:\n {8}.*)*)", attributes, re.M)), after


@dataclass(frozen=True, kw_only=True)
class MergeConfig(Configuration):
    """The choices that every method has; use `ATCConfig`, `ToMeConfig` or another baseline.

    A method of your own is a subclass, a frozen dataclass that defines `cluster`.

    Attributes:
        r: fraction of the tokens **kept**, in (0, 1]. It is rounded to a whole number of tokens, and from 64 tokens up
            to a multiple of 8, which suits tensor cores. May also be a function of the progress of denoising, from 0
            (noise) to 1, or a mapping from levels (downsampling factors) to either: `{1: 0.4, 2: 0.8}`. It sets the
            number of queries, and with it the number of outputs that are computed. A configuration with a lambda cannot
            be pickled; one with a named function can.
        r_keys: fraction of the keys and values kept, given like `r`; None: as `r`. Queries and keys are cut from one
            clustering. Merging keys changes the image less than merging queries, so the best trade is an `r_keys` well
            below `r`.
        features: the tensors that measure the similarity of tokens: the self-attention's "keys" (as in the text of the
            ATC paper), its "values", both ("keys_values", each scaled to unit standard deviation), or the block's input
            before its first norm ("hidden_states", as in the authors' code).
        proportional_attention: add the logarithm of the cluster size to the attention logits, so that a merged token
            weighs as much as its members did (Bolya et al. 2023, Eq. 1).
        widen_heads: add that logarithm in extra channels of the attention heads instead of in a mask, for kernels that
            take no mask, such as FlashAttention. The result is the same. `python -m atc_diffusion` times both ways on
            your device. Diffusers' default attention processors only.
        levels: which levels are merged. A level is the factor by which its grid of tokens is smaller than the latents.
            One factor or several, such as `(1, 2)`; "finest", the finest level that has self-attention (1 in Stable
            Diffusion 1 and 2; 2 in SDXL, SD3 and PixArt); "costly", every level whose attention costs at least half as
            much as the finest one's (adds level 4 in SDXL); or "all". Cannot be combined with a mapping for `r` or
            `r_keys`.
        share_guidance: cluster the tokens of an image once for all parts of its classifier-free guidance, by the
            features of the last part, which is the conditional one in Stable Diffusion. The parts are recognised by
            their equal latents, so this begins at the second step of a run.
        recluster_threshold: cluster again once the network's input latents have changed by more than this since the
            last clustering (norm of the change relative to the norm of the latents). 0 clusters at every call.
        forecast_tolerance: error budget of a run for skipped steps. A step is skipped, and its output extrapolated, if
            the expected error in the latents stays within the step's part of this budget (norm of the error relative to
            the norm of the latents). 0 computes every step; 0.5 skips 2 to 9 of 20. With samplers that add noise,
            a part of that noise counts as budget too. Nothing is skipped in runs of fewer than 12 steps, with samplers
            that repeat every timestep (Heun), and with solvers that weigh many earlier steps (PNDM, LMS); `summary`
            says why.
        record: keep the clusters of the last run for `merge_maps`.

    Raises:
        ValueError: naming the value that does not fit, and values that do.
    """

    r: Fractions = 0.6
    r_keys: Fractions | None = None
    features: Features = "keys"
    proportional_attention: bool = True
    widen_heads: bool = False
    levels: Levels | int | Sequence[int] = "finest"
    share_guidance: bool = False
    recluster_threshold: float = 0.0
    forecast_tolerance: float = 0.0
    record: bool = False

    def __post_init__(self) -> None:
        if type(self).cluster is MergeConfig.cluster:
            raise ValueError(f"{type(self).__name__} does not say how to cluster; use ATCConfig or ToMeConfig")
        object.__setattr__(self, "levels", _levels(self.levels))
        for name in ("r", "r_keys", "recluster_threshold", "forecast_tolerance"):
            if is_number(value := getattr(self, name)) and type(value) is not int:
                object.__setattr__(self, name, float(value))  # of NumPy's, too
        for name in ("r", "r_keys"):
            self._check_fractions(name)
        if isinstance(self.r, Mapping) and isinstance(self.r_keys, Mapping) and self.r.keys() != self.r_keys.keys():
            raise ValueError(f"r={self.r!r} and r_keys={self.r_keys!r} name different levels; name the same in both")
        check_member("features", self.features, get_args(Features))
        for name in ("recluster_threshold", "forecast_tolerance"):
            check_not_negative(name, getattr(self, name))

    def cluster(self, features: Tensor, grid: tuple[int, int], timestep: Tensor, num_clusters: int) -> Cuttable:
        """Cluster the tokens of a batch of images.

        Args:
            features: `[B, N, C]`, the vectors whose distances are clustered.
            grid: height and width of the tokens' grid; their product is `N`.
            timestep: scalar tensor, of the denoising step.
            num_clusters: the smallest number of clusters that the result will be cut to; fewer may be possible.
        """
        raise NotImplementedError

    def _check_fractions(self, name: str) -> None:
        fractions = getattr(self, name)
        if isinstance(fractions, Mapping):
            if not fractions or not all(map(is_count, fractions)):
                example = f"downsampling factors as keys, such as {{1: 0.4, 2: 0.8}}, got {fractions!r}"
                raise ValueError(f"{name} by level needs {example}")
            if self.levels != "finest":
                raise ValueError(f"{name}={fractions!r} names the levels; leave out levels={self.levels!r}")
        for fraction in _each(fractions):
            if callable(fraction):
                check_takes_one(name, fraction, "the progress of denoising, a number from 0 to 1")
            for progress in (0.0, 0.5, 1.0) if callable(fraction) else (None,):
                if fractions is not None or name == "r":
                    self._check_fraction(name, fraction, progress)

    def _check_fraction(self, name: str, fraction: object, progress: float | None) -> float:
        """The number that `fraction` gives at `progress`, if so many tokens can be kept."""
        if not callable(fraction):
            return check_fraction(name, fraction)
        return check_fraction(f"{name}({progress})", fraction(progress))

    @property
    def named_levels(self) -> frozenset[int] | None:
        """The levels that `r`, `r_keys` or `levels` lists, by downsampling factor; None if none of them does."""
        for each in (self.r, self.r_keys, self.levels):
            if isinstance(each, Mapping | tuple):
                return frozenset(each)
        return None

    @property
    def scheduled(self) -> bool:
        """Whether a fraction is a function of the progress of denoising."""
        return any(callable(fraction) for fractions in (self.r, self.r_keys) for fraction in _each(fractions))

    def num_kept(self, num_tokens: int, level: int, progress: float | None) -> tuple[int, int]:
        """How many queries and how many keys are kept of `num_tokens` at a level and at the progress of denoising.

        Raises:
            ValueError: if a fraction is a function of the progress, and that is None; or if it returns no fraction.
        """
        r = self._fraction("r", level, progress)
        r_keys = r if self.r_keys is None else self._fraction("r_keys", level, progress)
        return _num_kept(r, num_tokens), _num_kept(r_keys, num_tokens)

    def _fraction(self, name: str, level: int, progress: float | None) -> float:
        fractions = getattr(self, name)
        fraction = fractions[level] if isinstance(fractions, Mapping) else fractions
        if callable(fraction) and progress is None:
            raise ValueError(
                f"{name} is a function of progress, but the progress of this call is unknown; pass `t` from `for t in"
                " scheduler.timesteps`"
            )
        return self._check_fraction(name, fraction, progress)


def _each(fractions: Fractions | None) -> Iterator[Fraction | None]:
    yield from fractions.values() if isinstance(fractions, Mapping) else [fractions]


def _levels(levels: Levels | int | Sequence[int]) -> Levels | tuple[int, ...]:
    """`levels`, with factors as a tuple."""
    if isinstance(levels, str) and levels in get_args(Levels):
        return levels
    factors = as_counts(levels)
    if factors is None:
        names = ", ".join(map(repr, get_args(Levels)))
        raise ValueError(f"levels must be {names} or downsampling factors such as 1 or (1, 2), got {levels!r}")
    return factors


def _num_kept(fraction: float, num_tokens: int) -> int:
    """The count nearest to the fraction; of many, a multiple of `ALIGNMENT`, unless all are kept."""
    exact = fraction * num_tokens
    if fraction == 1 or exact < FEWEST_ALIGNED:
        return max(1, round(exact))
    return min(ALIGNMENT * round(exact / ALIGNMENT), num_tokens)
