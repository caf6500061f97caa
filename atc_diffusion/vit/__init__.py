"""Token merging in timm's vision transformers: their configuration, with validation."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from atc_diffusion.clustering import LINKAGES, Linkage, check_member
from atc_diffusion.config import Configuration
from atc_diffusion.validation import as_counts, check_count, check_fraction

Method = Literal["atc", "tome", "kmedoids", "dpc_knn", "topk", "evit"]
Schedule = Literal["constant", "linear"]

PRUNING = ("topk", "evit")


@dataclass(frozen=True, kw_only=True)
class ViTConfig(Configuration):
    """How tokens of a vision transformer are merged (Haurum et al. 2024, sections 4.1, 4.2 and 4.4).

    Give either `r` (keep a fraction of the tokens at a few blocks) or `t` (remove tokens in every block).
    Class, distillation and register tokens are never merged.

    Attributes:
        method: "atc"; the baselines "tome" (bipartite matching of alternating tokens, Bolya et al. 2023), "kmedoids"
            and "dpc_knn" (as in Haurum et al. 2023); or the pruning baselines "topk" and "evit" (Liang et al. 2022),
            which keep the tokens that the class token attends to and drop or fuse the rest.
        r: fraction of tokens to **keep** at each of `blocks`, in (0, 1]: `N` patches become `max(1, round(r * N))`.
        blocks: the blocks that merge tokens, counted from 1.
        t: tokens removed per block, on average over the blocks.
        schedule: "constant" removes `t` in every block (Eq. 4), "linear" goes from `2t` in the first to none in the
            last (Eq. 5).
        linkage: for "atc": "average", "complete", "single" or "ward".
        proportional_attention: add the logarithm of a cluster's size to its attention logits in all later blocks
            (Bolya et al. 2023, Eq. 1). Pruning methods never do.

    Raises:
        ValueError: for an invalid value; the message names it and the valid ones.
    """

    method: Method = "atc"
    r: float | None = None
    blocks: Sequence[int] = (4, 7, 10)
    t: int | None = None
    schedule: Schedule = "constant"
    linkage: Linkage = "average"
    proportional_attention: bool = True

    def __post_init__(self) -> None:
        check_member("method", self.method, get_args(Method))
        check_member("schedule", self.schedule, get_args(Schedule))
        check_member("linkage", self.linkage, LINKAGES)
        if self.linkage != "average" and self.method != "atc":
            raise ValueError(f"linkage={self.linkage!r} is for method='atc', got method={self.method!r}")
        if (self.r is None) == (self.t is None):
            raise ValueError(
                "give either r, the fraction of tokens to keep at each of blocks, or t, the tokens to remove per block;"
                f" got r={self.r!r}, t={self.t!r}"
            )
        if self.r is not None:
            check_fraction("r", self.r)
            if self.method == "tome" and self.r < 0.5:
                raise ValueError(
                    f"method='tome' keeps at least half of the tokens, got r={self.r}; use a larger r or 'atc'"
                )
        if self.t is not None:
            check_count("t", self.t, "a number of tokens from 1 up")
        blocks = as_counts(self.blocks)
        if blocks is None:
            raise ValueError(f"blocks must number blocks from 1 up, such as (4, 7, 10), got {self.blocks!r}")
        object.__setattr__(self, "blocks", blocks)

    def removed(self, depth: int) -> tuple[int, ...]:
        """Tokens that each of `depth` blocks removes, if `t` is given (Eqs. 4 and 5)."""
        t = self.t or 0
        if self.schedule == "constant":
            return (t,) * depth
        last = max(depth - 1, 1)
        return tuple(2 * t * (last - block) // last for block in range(depth))

    def kept(self, num_patches: int, depth: int) -> tuple[int, ...]:
        """Number of patches left after each of `depth` blocks."""
        kept, left = [], num_patches
        for block, removed in enumerate(self.removed(depth), start=1):
            if self.r is None:
                left = max(left - removed, self._fewest(left))
            elif block in self.blocks:
                left = max(round(self.r * left), self._fewest(left))
            kept.append(left)
        return tuple(kept)

    def _fewest(self, num_tokens: int) -> int:
        """ToMe merges at most every other token."""
        return (num_tokens + 1) // 2 if self.method == "tome" else 1
