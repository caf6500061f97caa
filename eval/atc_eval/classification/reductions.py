"""The reductions of a vision transformer's tokens that are compared."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from transformers.hf_argparser import HfArg

from atc_diffusion import ViTConfig
from atc_diffusion.clustering import LINKAGES
from atc_eval.checks import check_number, parse_fraction
from atc_eval.method import Method

MERGING, PRUNING = ("atc", "tome", "kmedoids", "dpc_knn"), ("topk", "evit")
SCHEDULES = ("constant", "linear")
TOME_KEEPS = 0.5  # at least


@dataclass(frozen=True)
class Trial:
    """A method to evaluate, on the model as it is or trained further with its tokens reduced so."""

    method: Method
    finetuned: bool = False

    @property
    def file(self) -> str:
        return f"{self.method.folder}{'-finetuned' * self.finetuned}.json"


@dataclass(frozen=True)
class Reductions:
    """Which methods are compared with the unreduced model."""

    _argument_group_name = "reductions of the tokens"
    method: list[str] = HfArg(
        default_factory=lambda: [*MERGING, *PRUNING],
        metadata={"choices": [*MERGING, *PRUNING]},
        help="methods to compare (default: all)",
    )
    linkage: list[str] = HfArg(
        default_factory="average complete single".split,
        metadata={"choices": list(LINKAGES)},
        help="linkages of atc (default: average complete single)",
    )
    keep: list[str] = HfArg(
        default_factory=list,
        help="percentages of the tokens kept at the 4th, 7th and 10th block (default: 25 50 70 90; none with --remove)",
    )
    remove: list[int] = HfArg(
        default_factory=list,
        help="tokens removed in every block, as in the paper's Table 1 (16 for ViT-B, 8 for ViT-L, 7 for ViT-H)",
    )
    schedule: list[str] = HfArg(
        default_factory=lambda: list(SCHEDULES),
        metadata={"choices": SCHEDULES},
        help="schedules of --remove (default: both)",
    )
    finetune: list[str] = HfArg(
        default_factory=list, help="with --demo: percentages at which the model is trained further, too"
    )

    def __post_init__(self) -> None:
        for number in self.remove:
            check_number("--remove", number)
        self.trials()  # raises ValueError for percentages that do not fit

    def trials(self) -> list[Trial]:
        """The unreduced model, every method at every strength that it supports, and those that train further."""
        trials = [Trial(Method(config)) for config in (None, *self._configs())]
        percentages = {100 * parse_fraction(text) for text in self.finetune}
        further = [Trial(each.method, finetuned=True) for each in trials if each.method.keep in percentages]
        return [*trials, *[Trial(Method(), finetuned=True)][: len(further)], *further]

    def _configs(self) -> Iterator[ViTConfig]:
        keeps = self.keep or ([] if self.remove else ["25", "50", "70", "90"])
        strengths: list[dict[str, Any]] = [{"r": parse_fraction(text)} for text in keeps]
        strengths += [{"t": number, "schedule": schedule} for number in self.remove for schedule in self.schedule]
        for method in self.method:
            for linkage in self.linkage if method == "atc" else ["average"]:
                for strength in strengths:
                    if method != "tome" or strength.get("r", 1) >= TOME_KEEPS:
                        options: dict[str, Any] = {"method": method, "linkage": linkage, **strength}
                        yield ViTConfig(**options)
