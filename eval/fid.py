"""FID of Stable Diffusion with merged tokens, as in Table 2 of Agglomerative Token Clustering (ECCV 2024).

Draws the same images (prompts and seeds are fixed) with the unmerged model and with every method asked for, scores each
set against reference images and against the unmerged set, and writes a report. Without options it is the paper's
experiment: ToMe and ATC by three linkages, at six fractions of the tokens, 2000 images each.

    python eval/fid.py --reference reference --list       # what would be drawn
    python eval/fid.py --reference reference
    python eval/fid.py --demo                             # a small experiment on the bundled model, without a GPU

Rerun a command to resume it. Further commands add methods to the same --out; the report covers all complete ones.

Several GPUs:

    accelerate launch eval/fid.py --reference reference

Several machines that share the folder --out, here two with 8 GPUs each; on each, with its own RANK from 0, and the
address of the FIRST:

    accelerate launch --multi_gpu --num_machines 2 --machine_rank $RANK --num_processes 16 --main_process_ip $FIRST \\
        --main_process_port 29500 eval/fid.py --reference reference --out /shared/fid

An array of jobs that do not talk to each other, and then one that scores:

    python eval/fid.py --part $SLURM_ARRAY_TASK_ID/8 --out /shared/fid
    python eval/fid.py --reference reference --out /shared/fid
"""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from atc_diffusion.commands import check_folder, check_number, one_sentence

with one_sentence("fid.py", extra="eval"):
    from accelerate import PartialState
    from transformers.hf_argparser import HfArg

    from atc_eval.command_line import counted, parse
    from atc_eval.draw.images import PlannedImage, Prompts, parse_part
    from atc_eval.draw.sampler import Sampler, Times
    from atc_eval.draw.sampling import EMOJI_DIFFUSION, STABLE_DIFFUSION, Sampling
    from atc_eval.draw.sets import DRAWN, check_folder_settings, claim_folder, complete_sets, make_sets, note_command
    from atc_eval.environment import in_words
    from atc_eval.grid import Comparison
    from atc_eval.method import Method
    from atc_eval.report.results import Result, Study, score_sets
    from atc_eval.report.sections import write_report
    from atc_eval.score.scorer import Scorer, Scoring

Plan = dict[Method, list[PlannedImage]]
DEMO = shlex.split(  # a small experiment, on the model of this repository
    f"--model '{EMOJI_DIFFUSION}' --class-names '{EMOJI_DIFFUSION}/things.txt' --prompt {{}} --classes 12 "
    f"--reference '{EMOJI_DIFFUSION}/pictures' --images-per-class 1 --steps 20 --guidance 3 --batch-size 4 "
    "--method paper atc --keep 50 100/12.5 --rival steps:0.7 --time 1 --features efficientnet-lite0 --out out/demo"
)
MOST_ON_A_CPU = 100  # images of a full-size model, which takes minutes for one


@dataclass(frozen=True)
class Output:
    """What is done, and where results go."""

    _argument_group_name = "output"
    out: Path = HfArg(default=Path("out/fid"), help="folder for images and features")
    report: Path | None = HfArg(default=None, help="folder for the report (default: the same)")
    time: int = HfArg(default=0, help="batches to time with each method, in turn")
    part: str | None = HfArg(default=None, help="draw only one part of the images, such as 3/8, and score nothing")
    demo: bool = HfArg(default=False, help="a small experiment on the bundled emoji model: offline, no GPU")
    dry_run: bool = HfArg(default=False, aliases=["--list"], help="print seed, file and prompt of all images, and stop")

    def __post_init__(self) -> None:
        check_folder("--out", self.out)
        check_folder("--report", self.report)
        check_number("--time", self.time, least=0)
        parse_part(self.part)


KINDS = (Comparison, Output, Prompts, Sampling, Scoring)


def main(arguments: Sequence[str] | None = None) -> None:
    given = sys.argv[1:] if arguments is None else arguments
    options = parse(KINDS, __doc__, given, DEMO if "--demo" in given else ())
    with one_sentence("fid.py", extra="eval", stopped="rerun the command to resume"):
        run(*options)


def run(comparison: Comparison, output: Output, prompts: Prompts, sampling: Sampling, scoring: Scoring) -> None:
    """Draw the missing images, time, score and report; everything is checked before the first image is drawn."""
    state = PartialState(cpu=sampling.device == "cpu", timeout=timedelta(days=7))  # processes wait for the slowest
    images, settings, out, part = prompts.plan(), sampling.json(state.device), output.out, parse_part(output.part)
    check_folder_settings(out, settings, DRAWN)
    sets = make_sets(out, comparison.methods(), images, settings)
    missing = {method: each.missing() for method, each in sets.items()}
    wanted = set(images[part])  # whatever is missing
    own = {method: [image for image in each if image in wanted] for method, each in missing.items()}
    if state.is_main_process:
        if output.dry_run:
            prompts.print_list()
        print(outline(missing, own, len(images), sampling.steps), flush=True)
    if output.dry_run:
        return
    count = sum(map(len, own.values()))
    refuse_months(sampling, state, count)
    is_scoring = state.is_main_process and output.part is None
    prepared = scoring.prepare(out / "features", state.device) if is_scoring else None
    sampler = Sampler(sampling, state, part)
    if count:
        sampler.check(list(sets))
        if state.is_main_process:
            claim_folder(out, settings, DRAWN)
        sampler.draw_missing(sets, own)
    if prepared:
        sets = complete_sets(out, images, settings)
        times = Times(out / "times.json")
        times.measure(sampler, sets, images, output.time)
        scorer = prepared(sets[Method()])
        report(score_sets(sets, scorer, times), scorer, prompts, sampling, output)
    elif state.is_main_process:
        print(f"part {output.part} is drawn; when all parts are, run the command without --part to score them")


def outline(missing: Plan, own: Plan, num_images: int, steps: int) -> str:
    """What there is to draw, in words; `own` is what this part draws of the `missing` images."""
    total, left, here = len(missing) * num_images, *(sum(map(len, each.values())) for each in (missing, own))
    sets, images = counted(len(missing), "set"), counted(num_images, "image")
    plan = f"{sets} of {images}, {counted(steps, 'step')} each: {counted(total, 'image')}, of which "
    part = f" This part draws {here} of the others." if here < left else ""
    estimate = " The first batch tells how long the others will take." if here else ""
    return f"{plan}{total - left} {'is' if total - left == 1 else 'are'} drawn already.{part}{estimate}"


def refuse_months(sampling: Sampling, state: PartialState, count: int) -> None:
    if state.device.type == "cpu" and sampling.device == "auto" and sampling.is_full_size and count > MOST_ON_A_CPU:
        raise ValueError(
            f"PyTorch finds no GPU here, and a CPU takes minutes for each of these {count} images; run this on a "
            "machine with a GPU, draw fewer (--classes 10), try --demo, or give --device cpu to draw them here"
        )


def report(results: list[Result], scorer: Scorer, prompts: Prompts, sampling: Sampling, output: Output) -> None:
    study = Study(
        results,
        features=scorer.features.name,
        conditions=conditions(results[0], prompts, sampling, scorer),
        commands=note_command(output.out),
        draws=scorer.draws,
        shown=prompts.shown(),
        is_papers_model=sampling.model == STABLE_DIFFUSION,
    )
    folder = output.report or output.out
    write_report(study, folder)
    print(f"wrote {folder / 'report.html'}")


def conditions(unmerged: Result, prompts: Prompts, sampling: Sampling, scorer: Scorer) -> dict[str, str]:
    """The conditions that the figures hold under, in words."""
    images, record = unmerged.images.images, unmerged.record
    width, height = unmerged.images.load(images[0]).size
    scheduler = f", {sampling.scheduler}" if sampling.scheduler else ""
    return {
        "model": sampling.name,
        "images": f"n = {len(images)}, {prompts.images_per_class} of each class, prompt `{prompts.prompt}`",
        "reference": f"{len(scorer.reference)} images",
        "sampling": f"{counted(sampling.steps, 'step')}{scheduler}, guidance {sampling.guidance:g}, {width} x "
        f"{height}, base seed {prompts.seed}",
        "device": f"{', '.join(record['devices'])}; {sampling.dtype or 'default dtype'}, "
        f"batch size {sampling.batch_size}",
        "versions": in_words(record["versions"]),
        "intervals": f"95 %, {scorer.bootstrap} bootstrap draws",
    }


if __name__ == "__main__":
    main()
