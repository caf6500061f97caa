"""The user's choices: which tokens are merged, how many, and for how long. Validated data, nothing else."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Literal, get_args

from atc_diffusion.clustering import check_choices, check_member

Share = float | Callable[[float], float]
Levels = Literal["finest", "costly", "all"]
Features = Literal["keys", "values", "keys_values", "hidden_states"]

ALIGNMENT = 8  # keys: what tensor cores work best with
FEWEST_ALIGNED = 64  # tokens from which the rounding changes a share by less than a sixteenth


@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """The choices that every way of merging has; use `ATCConfig`, `ToMeConfig` or another baseline.

    Attributes:
        r: share of the tokens **kept**, in (0, 1]. It is rounded to a whole number of tokens, and from 64 tokens up to
            a multiple of 8, which suits tensor cores. May also be a function of the progress of denoising, from 0
            (noise) to 1, or a mapping from levels (downsampling factors) to either: `{1: 0.4, 2: 0.8}`. It sets the
            number of queries, and with it the number of outputs that are computed. A configuration with a lambda cannot
            be pickled; one with a named function can.
        r_keys: share of the keys and values kept, given like `r`; None: as `r`. Queries and keys are cut from one
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
        levels: which levels are merged, by downsampling factor: a tuple such as (1, 2); "finest", the finest level that
            has self-attention (1 in Stable Diffusion 1 and 2; 2 in SDXL, SD3 and PixArt); "costly", every level whose
            attention costs at least half as much as the finest one's (adds level 4 in SDXL); or "all". Cannot be
            combined with a mapping for `r` or `r_keys`.
        share_guidance: cluster the tokens of an image once for all parts of its classifier-free guidance, by the
            features of the last part, which is the conditional one in Stable Diffusion. The parts are recognised by
            their equal latents, so sharing begins at the second step of a run.
        share_layers: number of consecutive layers of a level that use one clustering.
        recluster_threshold: cluster again once the network's input latents have changed by more than this since the
            last clustering (norm of the change relative to the norm of the latents). 0 clusters at every call.
        forecast_tolerance: skip calls of the network and extrapolate their outputs from the last ones, as long as that
            is expected to change the latents by at most this much over a whole run (norm of the change relative to the
            norm of the latents). Each step may cause its share of the change. 0 computes every step; 0.3 skips about
            half of them. Nothing is skipped with samplers that add noise or repeat every timestep (Heun), nor in runs
            known to have fewer than 20 steps.
        record: keep the clusters of the last run for `merge_maps`.

    Raises:
        ValueError: naming the value that does not fit, and values that do.
    """

    r: Share | Mapping[int, Share] = 0.6
    r_keys: Share | Mapping[int, Share] | None = None
    features: Features = "keys"
    proportional_attention: bool = True
    widen_heads: bool = False
    levels: Levels | tuple[int, ...] = "finest"
    share_guidance: bool = False
    share_layers: int = 1
    recluster_threshold: float = 0.0
    forecast_tolerance: float = 0.0
    record: bool = False

    def __post_init__(self) -> None:
        if type(self) is MergeConfig:
            raise ValueError("MergeConfig does not say how to cluster; use ATCConfig or ToMeConfig")
        for name in ("r", "r_keys"):
            self._check_shares(name)
        if isinstance(self.r, Mapping) and isinstance(self.r_keys, Mapping) and self.r.keys() != self.r_keys.keys():
            raise ValueError(f"r={self.r!r} and r_keys={self.r_keys!r} name different levels; name the same in both")
        check_member("features", self.features, get_args(Features))
        self._check_levels()
        check_count("share_layers", self.share_layers, "a number of layers from 1 up")
        for name in ("recluster_threshold", "forecast_tolerance"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool) or not value >= 0:
                raise ValueError(f"{name} must be a number from 0 up, got {value!r}")

    def __str__(self) -> str:
        """Python code for this configuration, without the choices that are left at their defaults."""
        changed = [f.name for f in fields(self) if f.name == "r" or getattr(self, f.name) != f.default]
        options = ", ".join(f"{name}={getattr(self, name)!r}" for name in changed)
        return f"{type(self).__name__}({options})"

    def _check_levels(self) -> None:
        if self.levels in get_args(Levels):
            return
        if not isinstance(self.levels, tuple) or not self.levels or not all(map(_is_count, self.levels)):
            choices = ", ".join(map(repr, get_args(Levels)))
            raise ValueError(
                f"levels must be {choices} or a tuple of downsampling factors such as (1, 2), got {self.levels!r}"
            )

    def _check_shares(self, name: str) -> None:
        shares = getattr(self, name)
        if isinstance(shares, Mapping):
            if not shares or not all(_is_count(level) for level in shares):
                example = f"downsampling factors as keys, such as {{1: 0.4, 2: 0.8}}, got {shares!r}"
                raise ValueError(f"{name} by level needs {example}")
            if self.levels != "finest":
                raise ValueError(f"{name}={shares!r} names the levels; leave out levels={self.levels!r}")
        for share in shares.values() if isinstance(shares, Mapping) else [shares]:
            if share is not None or name == "r":
                self._check_share(name, share)

    def _check_share(self, name: str, share: object) -> None:
        """A function is asked at the beginning, in the middle and at the end."""
        for progress in (0.0, 0.5, 1.0) if callable(share) else (None,):
            self._check_number(name, share, progress)

    def _check_number(self, name: str, share: object, progress: float | None) -> float:
        """The number that `share` gives at `progress`, if it is one that can be kept."""
        number = share(progress) if callable(share) else share
        if isinstance(number, int | float) and not isinstance(number, bool) and 0 < number <= 1:
            return number
        if callable(share):
            raise ValueError(f"{name} must return a share of tokens, in (0, 1], but {name}({progress}) is {number!r}")
        hint = f"; did you mean {number / 100:g}?" if isinstance(number, int | float) and 1 < number <= 100 else ""
        raise ValueError(f"{name} is the share of tokens kept, in (0, 1], got {number!r}{hint}")

    @property
    def named_levels(self) -> frozenset[int] | None:
        """The levels that `r`, `r_keys` or `levels` lists, by downsampling factor; None if none of them does."""
        named = [each for each in (self.r, self.r_keys, self.levels) if isinstance(each, Mapping | tuple)]
        return frozenset(named[0]) if named else None

    @property
    def scheduled(self) -> bool:
        """Whether a share is a function of the progress of denoising."""
        shares = (self.r, self.r_keys)
        return any(map(callable, (each for x in shares for each in (x.values() if isinstance(x, Mapping) else [x]))))

    def num_kept(self, num_tokens: int, level: int, progress: float | None) -> tuple[int, int]:
        """How many queries and how many keys are kept of `num_tokens` at a level and at the progress of denoising.

        Raises:
            ValueError: if a share is a function of the progress, and that is None; or if it gives no share.
        """
        r = self._share("r", level, progress)
        r_keys = r if self.r_keys is None else self._share("r_keys", level, progress)
        return _num_kept(r, num_tokens), _num_kept(r_keys, num_tokens)

    def _share(self, name: str, level: int, progress: float | None) -> float:
        shares = getattr(self, name)
        share = shares[level] if isinstance(shares, Mapping) else shares
        if callable(share) and progress is None:
            raise ValueError(
                f"{name} is a function of the progress of denoising, which this timestep does not tell; call the"
                " network with an entry of scheduler.timesteps"
            )
        return self._check_number(name, share, progress)


@dataclass(frozen=True, kw_only=True)
class ATCConfig(MergeConfig):
    """Agglomerative Token Clustering (Haurum et al. 2024, section 3.2).

    By default one clustering is shared by all parts of guidance and reused until the latents have moved by
    `recluster_threshold`, at any number of steps. `paper` reclusters at every call.

    Attributes:
        linkage: distance between clusters: "single", "complete", "average" (Eqs. 1-3, over cosine distance) or
            "ward" (over Euclidean distance; not in the paper).
        window_size: longest side, in tokens, of the windows that are clustered separately. None clusters the whole
            image at once, which stays a little closer to the unmerged image (eval/results) and takes longer the more
            tokens there are.
        backend: the implementation of the clustering, by a name that `agglomerate` takes; None: the fastest.
    """

    linkage: str = "average"
    window_size: int | None = 16
    share_guidance: bool = True
    recluster_threshold: float = 0.15
    backend: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window_size is not None and not (_is_count(self.window_size) and self.window_size >= 2):
            raise ValueError(f"window_size must be None or a side of at least 2 tokens, got {self.window_size!r}")
        check_choices(self.linkage, backend=self.backend)

    @classmethod
    def paper(cls, r: float, linkage: str = "average") -> "ATCConfig":
        """The setting of the paper's Table 2, after the authors' code: hidden states, plain means, no weights.

        Every attention is reclustered at every call, without windows.
        """
        return cls(
            r=r,
            linkage=linkage,
            features="hidden_states",
            proportional_attention=False,
            window_size=None,
            share_guidance=False,
            recluster_threshold=0.0,
        )

    @classmethod
    def faster(cls, r_keys: Share | Mapping[int, Share] = 0.125) -> "ATCConfig":
        """`fast` with forecasting: with deterministic samplers, the network runs at about half of the steps."""
        return replace(cls.fast(r_keys), forecast_tolerance=0.3)

    @classmethod
    def fast(cls, r_keys: Share | Mapping[int, Share] = 0.125) -> "ATCConfig":
        """The fastest setting that stays close to the unmerged images: all queries, few keys (eval/results).

        It merges every costly level, unless `r_keys` names the levels: one in Stable Diffusion 1 and 2, two in SDXL.
        Ward linkage keeps the spread within clusters small, and that spread is what merging keys loses.
        """
        return cls(r=1.0, r_keys=r_keys, linkage="ward", levels="finest" if isinstance(r_keys, Mapping) else "costly")


def _num_kept(share: float, num_tokens: int) -> int:
    """The count nearest to the share; of many, a multiple of `ALIGNMENT`, unless all are kept."""
    exact = share * num_tokens
    if share == 1 or exact < FEWEST_ALIGNED:
        return max(1, round(exact))
    return min(ALIGNMENT * round(exact / ALIGNMENT), num_tokens)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def check_count(name: str, value: object, meaning: str) -> None:
    if not _is_count(value):
        raise ValueError(f"{name} must be {meaning}, got {value!r}")
