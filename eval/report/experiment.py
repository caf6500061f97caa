"""The whole experiment: draw the missing pictures, time, score, report."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from accelerate import PartialState
from tqdm import tqdm

from arguments import checks
from arguments.options import option
from draw.configuration import Configuration
from draw.experiment import Sets, complete_sets, make_sets, note_command
from draw.picture_set import claim_folder
from draw.pictures import Prompts
from draw.pipeline import STABLE_DIFFUSION, Sampling
from draw.sampler import Sampler, read_records
from draw.timing import Times
from machine import in_words
from report.study import Result, Study
from report.tables import write_report
from score.options import Scoring
from score.scorer import Scorer


@dataclass(frozen=True)
class Output:
    """output"""

    out: Path = option("folder for pictures and features", Path("out/fid"), checks.folder_to_write)
    report: Path | None = option("folder for the report (default: the same)", None, checks.folder_to_write)
    time: int = option("batches to time with each configuration, in turn", 0, checks.whole(0))


def run(ways: Sequence[Configuration], prompts: Prompts, sampling: Sampling, scoring: Scoring, output: Output) -> None:
    """Run the experiment; everything is checked before the first picture is drawn."""
    state = PartialState(cpu=sampling.device == "cpu", timeout=timedelta(days=7))  # processes wait for the slowest
    pictures, settings, out = prompts.plan(), sampling.json(state.device), output.out
    claim_folder(out, settings, write=state.is_main_process)
    sets = make_sets(out, ways, pictures, settings)
    prepared = scoring.prepare(out / "features", state.device) if state.is_main_process else None
    sampler = Sampler(sampling, state)
    sampler.complete(sets)
    if prepared is None:
        return
    commands = note_command(out)
    sets = complete_sets(out, pictures, settings)
    times = Times(out / "times.json")
    times.measure(sampler, list(sets), pictures, output.time)
    scorer = prepared(sets[Configuration()])
    results = score(sets, scorer, times)
    study = Study(
        results,
        features=scorer.features.name,
        conditions=conditions(results[0], prompts, sampling, scoring, len(scorer.reference)),
        commands=commands,
        draws=scorer.draws,
        shown=prompts.shown(),
        is_papers_model=sampling.model == STABLE_DIFFUSION,
    )
    folder = output.report or out
    write_report(study, folder)
    print(f"wrote {folder / 'report.html'}")


def score(sets: Sets, scorer: Scorer, times: Times) -> list[Result]:
    timing = times.medians(list(sets)).to_dict("index")
    return [
        Result(each, pictures, scorer(pictures), read_records(pictures.folder), timing.get(each.folder, {}))
        for each, pictures in tqdm(sets.items(), desc="scoring", unit="set")
    ]


def conditions(
    unmerged: Result, prompts: Prompts, sampling: Sampling, scoring: Scoring, references: int
) -> dict[str, str]:
    """The conditions that the figures hold under, in words."""
    pictures, record = unmerged.pictures.pictures, unmerged.record
    width, height = unmerged.pictures.load(pictures[0]).size
    scheduler = f", {sampling.scheduler}" if sampling.scheduler else ""
    return {
        "model": sampling.name,
        "pictures": f"n = {len(pictures)}, {prompts.images_per_class} of each class, prompt `{prompts.prompt}`",
        "reference": f"{references} pictures",
        "sampling": f"{sampling.steps} steps{scheduler}, guidance {sampling.guidance:g}, {width} x {height}, "
        f"base seed {prompts.seed}",
        "device": f"{', '.join(record['devices'])}; {sampling.dtype or 'default dtype'}, "
        f"batch size {sampling.batch_size}",
        "versions": in_words(record["versions"]),
        "intervals": f"95 %, {scoring.bootstrap} bootstrap draws",
    }
