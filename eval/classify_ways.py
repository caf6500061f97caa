"""Ways of reducing a vision transformer's tokens, as the experiment names them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from timm.models.vision_transformer import VisionTransformer

from atc_diffusion import ViTConfig, patched

METHODS = {"atc": "ATC", "tome": "ToMe", "kmedoids": "K-Medoids", "dpc_knn": "DPC-KNN", "topk": "Top-K", "evit": "EViT"}
TOME_KEEPS = 50  # percent at least


@dataclass(frozen=True)
class Way:
    """One way, with how much it reduces: a share kept at the 4th, 7th and 10th block, or tokens removed per block.

    Attributes:
        method: as in `ViTConfig`; None: the model as it is.
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
        """How much it reduces: only ways of one column are compared."""
        if self.method is None:
            return ""
        return f"{self.keep:g} %" if self.keep is not None else f"{self.schedule}, t = {self.remove}"

    @property
    def file(self) -> str:
        words = f"{self.label} {self.column} {'finetuned' * self.finetuned}".split()
        return "-".join(words).replace("-%", "").replace(",", "") + ".json"

    @contextmanager
    def applied(self, model: VisionTransformer) -> Iterator[None]:
        """Reduces the tokens of `model` for the length of a `with` block."""
        if self.method is None:
            yield
            return
        options: dict[str, Any] = {"method": self.method, "linkage": self.linkage, "schedule": self.schedule}
        config = ViTConfig(r=None if self.keep is None else self.keep / 100, t=self.remove, **options)
        with patched(model, config):
            yield


def ways(
    methods: Sequence[str],
    linkages: Sequence[str],
    keeps: Sequence[float],
    removed: Sequence[int],
    schedules: Sequence[str],
) -> Iterator[Way]:
    """The unreduced model first, then every method at every reduction that it can do."""
    yield Way()
    for method in methods:
        for linkage in linkages if method == "atc" else ["average"]:
            for keep in keeps:
                if method != "tome" or keep >= TOME_KEEPS:
                    yield Way(method, linkage, keep=keep)
            for remove in removed:
                for schedule in schedules:
                    yield Way(method, linkage, remove=remove, schedule=schedule)
