"""The ways of reducing a vision transformer's tokens, and their names."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from timm.models.vision_transformer import VisionTransformer

from arguments import checks
from arguments.options import option
from atc_diffusion import ViTConfig, patched
from atc_diffusion.clustering import LINKAGES

METHODS = {"atc": "ATC", "tome": "ToMe", "kmedoids": "K-Medoids", "dpc_knn": "DPC-KNN", "topk": "Top-K", "evit": "EViT"}
SCHEDULES = ("constant", "linear")
TOME_KEEPS = 50  # percent, at least


@dataclass(frozen=True)
class Way:
    """One way, and its strength: a share kept at the 4th, 7th and 10th block, or tokens removed per block.

    Attributes:
        method: as in `ViTConfig`; None: no reduction.
        keep: percent kept at each stage.
        remove: tokens removed per block, by `schedule`.
        finetuned: whether the model was trained further with this reduction in place.
    """

    method: str | None = None
    linkage: str = "average"
    keep: float | None = None
    remove: int | None = None
    schedule: str = "constant"
    finetuned: bool = False

    @property
    def label(self) -> str:
        if self.method is None:
            return "no reduction"
        return METHODS[self.method] + (f" {self.linkage}" if self.method == "atc" else "")

    @property
    def column(self) -> str:
        """The strength in words; only ways of one column are compared."""
        if self.method is None:
            return ""
        return f"{self.keep:g} %" if self.keep is not None else f"{self.schedule}, t = {self.remove}"

    @property
    def file(self) -> str:
        words = f"{self.label} {self.column} {'finetuned' * self.finetuned}".split()
        return "-".join(words).replace("-%", "").replace(",", "") + ".json"

    @contextmanager
    def applied(self, model: VisionTransformer) -> Iterator[None]:
        """Reduce the tokens of `model` within a `with` block."""
        if self.method is None:
            yield
            return
        options: dict[str, Any] = {"method": self.method, "linkage": self.linkage, "schedule": self.schedule}
        config = ViTConfig(r=None if self.keep is None else self.keep / 100, t=self.remove, **options)
        with patched(model, config):
            yield


@dataclass(frozen=True)
class Reductions:
    """reduction of the tokens"""

    method: tuple[str, ...] = option("(default: all)", tuple(METHODS), choices=list(METHODS))
    linkage: tuple[str, ...] = option(
        "of atc (default: average complete single)", ("average", "complete", "single"), choices=LINKAGES
    )
    keep: tuple[float, ...] = option(
        "percentages of the tokens kept at the 4th, 7th and 10th block (default: 25 50 70 90)",
        (25.0, 50.0, 70.0, 90.0),
        checks.percent,
        nargs="*",
    )
    remove: tuple[int, ...] = option(
        "tokens removed in every block, as in the paper's Table 1 (16 for ViT-B, 8 for ViT-L, 7 for ViT-H)",
        (),
        checks.whole(1),
    )
    schedule: tuple[str, ...] = option("of --remove (default: both)", SCHEDULES, choices=SCHEDULES)
    finetune: tuple[float, ...] = option("with --demo: percentages at which to train further, too", (), checks.percent)

    def ways(self) -> list[Way]:
        """The unreduced model, then every method at every strength that it supports, then the fine-tuned ways."""
        chosen = [Way(), *(way for method in self.method for way in self._of(method))]
        further = [way for way in chosen if way.keep in self.finetune]
        return [*chosen, *(replace(way, finetuned=True) for way in chosen[: bool(further)] + further)]

    def _of(self, method: str) -> Iterator[Way]:
        for linkage in self.linkage if method == "atc" else ["average"]:
            for keep in self.keep:
                if method != "tome" or keep >= TOME_KEEPS:
                    yield Way(method, linkage, keep=keep)
            for remove in self.remove:
                for schedule in self.schedule:
                    yield Way(method, linkage, remove=remove, schedule=schedule)
