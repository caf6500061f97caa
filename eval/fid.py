"""FID of Stable Diffusion with merged tokens, as in Table 2 of Agglomerative Token Clustering (ECCV 2024).

Draws the same pictures (prompts and seeds are fixed) with the unmerged model and with every configuration asked for,
scores each set against reference pictures and against the unmerged set, and writes a report. Rerun the command to
resume an interrupted run. `accelerate launch eval/fid.py ...` divides the pictures between GPUs. Further commands add
configurations to the same --out; the report covers all complete ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from arguments.door import door
from arguments.options import parse, switch

with door("fid.py", extra="eval"):
    from draw.grid import Ways
    from draw.pictures import Prompts
    from draw.pipeline import EMOJI_DIFFUSION, Sampling
    from draw.rivals import Rival
    from report.experiment import Output, run
    from score.options import Scoring

DEMO = {  # a small experiment, on the model of this repository
    "model": str(EMOJI_DIFFUSION),
    "class_names": str(EMOJI_DIFFUSION / "things.txt"),
    "prompt": "{}",
    "reference": str(EMOJI_DIFFUSION / "pictures"),
    "steps": 20,
    "guidance": 3.0,
    "batch_size": 4,
    "classes": "12",
    "images_per_class": 1,
    "keep": ((0.5, None), (1.0, 0.125)),
    "method": ("paper", "atc"),
    "rival": (Rival("steps", 0.7),),
    "time": 1,
    "features": "efficientnet-lite0",
    "out": Path("out/demo"),
}


@dataclass(frozen=True)
class Experiment:
    """The options of the command line."""

    ways: Ways
    output: Output
    prompts: Prompts
    sampling: Sampling
    scoring: Scoring
    demo: bool = switch("a small experiment on the emoji model of this repository: offline, no GPU")
    list: bool = switch("print seed, file and prompt of every picture, and stop")


def main(arguments: Sequence[str] | None = None) -> None:
    experiment = parse(Experiment, __doc__, arguments, demo=DEMO)
    if experiment.list:
        experiment.prompts.print_list()
        return
    with door("fid.py", extra="eval"):
        configurations = experiment.ways.configurations()
        run(configurations, experiment.prompts, experiment.sampling, experiment.scoring, experiment.output)


if __name__ == "__main__":
    main()
