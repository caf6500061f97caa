"""FID of Stable Diffusion with merged tokens, as in Table 2 of Agglomerative Token Clustering (ECCV 2024).

Draws the same pictures (prompts and seeds are fixed) with the unmerged model and with every configuration asked for,
scores each set against reference pictures and against the unmerged set, and writes a report. Rerun the command to
resume an interrupted run. `accelerate launch eval/fid.py ...` divides the pictures between GPUs. Further commands can
add configurations to the same --out; the report covers all that are complete.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
from accelerate import PartialState
from arguments import STABLE_DIFFUSION, configurations, parse
from configurations import Configuration
from features import Features
from generate import Sampler, Sampling, load_pipeline, make_sampling, read_records, weights_digest
from interleaved import Times, medians
from pictures import Picture, PictureSet, claim_folder, plan, read_stamp, select_classes, write_atomically
from reference import list_pictures
from report import write_report
from results import Result, Study
from scores import Lpips, Scorer
from tqdm import tqdm

FEWEST = 4  # pictures in a set: precision and recall look at three neighbours
COMMANDS = "commands.txt"


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(__doc__, arguments)
    try:
        run(args)
    except (ValueError, OSError) as error:
        sys.exit(f"fid.py: {error}")
    except KeyboardInterrupt:
        sys.exit("fid.py: stopped; rerun the command to resume")


def run(args: argparse.Namespace) -> None:
    """Draw what is missing, then time, score and report; every argument is checked first."""
    pictures = planned_pictures(args)
    shown = shown_pictures(pictures, args.show)
    ways = configurations(args)
    if args.list:
        print_list(pictures)
        return
    state = PartialState(cpu=args.device == "cpu", timeout=timedelta(days=7))  # processes wait for the slowest
    sampling = make_sampling(args, state.device, weights_digest(args.model))
    claim_folder(args.out, sampling.json, write=state.is_main_process)
    sets = {each: make_set(args.out, each, pictures, sampling) for each in ways}
    make_scorer = prepare_scoring(args, state.device) if state.is_main_process else None
    sampler = Sampler(partial(load_pipeline, sampling, state.device), sampling, state)
    if any(each.missing() for each in sets.values()):
        sampler.run(sets)
    if make_scorer is not None:
        note_command(args.out)
        sets = complete_sets(args.out, pictures, sampling)
        times = Times(args.out / "times.json")
        times.measure(sampler, list(sets), pictures, args.time)
        scorer = make_scorer(sets[Configuration()])
        study = make_study(args, score(sets, scorer, times), scorer, shown)
        write_report(study, args.report or args.out)
        print(f"wrote {(args.report or args.out) / 'report.html'}")


def prepare_scoring(args: argparse.Namespace, device: torch.device) -> Callable[[PictureSet], Scorer]:
    """What makes the scorer once the unmerged pictures are there; weights and reference are checked now."""
    reference = reference_pictures(args)
    features = Features(args.features, args.resize, args.out / "features", device, args.inception_weights)
    return partial(Scorer, features, reference, bootstrap=args.bootstrap, lpips=Lpips() if args.lpips else None)


def planned_pictures(args: argparse.Namespace) -> list[Picture]:
    names = args.class_names.read_text().splitlines()
    classes = select_classes(args.classes, len(names))
    if len(classes) * args.images_per_class < FEWEST:
        raise ValueError(f"{len(classes)} x {args.images_per_class} pictures are too few to score; {FEWEST} at least")
    return plan(names, classes, args.images_per_class, args.prompt, args.seed)


def shown_pictures(pictures: Sequence[Picture], classes: Sequence[int] | None) -> list[Picture]:
    """The first picture of each of the `classes` to show."""
    firsts = {picture.class_index: picture for picture in pictures if picture.image_index == 0}
    missing = [index for index in classes or [] if index not in firsts]
    if missing:
        raise ValueError(f"--show {missing[0]}, but there are no pictures of that class; see --list")
    return [firsts[index] for index in classes or list(firsts)[:1]]


def print_list(pictures: Sequence[Picture]) -> None:
    print("class", "image", "seed", "file", "prompt", sep="\t")
    for picture in pictures:
        print(picture.class_index, picture.image_index, picture.seed, picture.file, picture.prompt, sep="\t")


def reference_pictures(args: argparse.Namespace) -> list[Path]:
    folder = args.reference
    if folder is None:
        raise ValueError("--reference DIR is needed; eval/reference.py makes it from ImageNet's validation pictures")
    paths = list_pictures(folder)
    if len(paths) < FEWEST:
        raise ValueError(f"--reference {folder} has {len(paths)} pictures; {FEWEST} at least are needed")
    return paths


def make_set(out: Path, configuration: Configuration, pictures: Sequence[Picture], sampling: Sampling) -> PictureSet:
    origin = sampling.json | {"way": configuration.json}
    return PictureSet(out / "sets" / configuration.folder, pictures, origin)


def complete_sets(out: Path, pictures: Sequence[Picture], sampling: Sampling) -> dict[Configuration, PictureSet]:
    """All sets in `out` that have all `pictures`, those of earlier commands too, the unmerged one first."""
    origins = [json.loads(read_stamp(path) or "{}") for path in out.glob(f"sets/*/{pictures[0].file}")]
    configurations = [Configuration.from_json(origin["way"]) for origin in origins if "way" in origin]
    sets = {each: make_set(out, each, pictures, sampling) for each in sorted(configurations, key=_place)}
    return {each: pictures for each, pictures in sets.items() if not pictures.missing()}


def _place(configuration: Configuration) -> tuple[object, ...]:
    """Where a configuration stands in tables: unmerged, rivals, ToMe, ATC; and less and less kept."""
    label = configuration.label
    return not configuration.is_unmerged, label.startswith("ATC"), label, [-value for value in configuration.strength]


def score(sets: dict[Configuration, PictureSet], scorer: Scorer, times: Times) -> list[Result]:
    timing = medians(times.of(list(sets))).to_dict("index")
    return [
        Result(each, pictures, scorer(pictures), read_records(pictures.folder), timing.get(each.folder, {}))
        for each, pictures in tqdm(sets.items(), desc="scoring", unit="set")
    ]


def make_study(args: argparse.Namespace, results: list[Result], scorer: Scorer, shown: list[Picture]) -> Study:
    pictures = results[0].pictures.pictures
    record = results[0].record
    width, height = results[0].pictures.load(pictures[0]).size
    conditions = {
        "model": Path(args.model).name if Path(args.model).is_dir() else args.model,
        "pictures": f"n = {len(pictures)}, {args.images_per_class} of each class, prompt `{args.prompt}`",
        "reference": f"{len(scorer.reference)} pictures",
        "sampling": f"{args.steps} steps, guidance {args.guidance:g}, {width} x {height}, base seed {args.seed}",
        "device": f"{', '.join(record['devices'])}; {args.dtype or 'default dtype'}, batch size {args.batch_size}",
        "versions": ", ".join(f"{name} {version}" for name, version in record["versions"].items()),
        "intervals": f"95 %, {args.bootstrap} bootstrap draws",
    }
    return Study(
        results,
        scorer.features.name,
        conditions,
        commands=(args.out / COMMANDS).read_text().splitlines(),
        draws=scorer.draws,
        shown=shown,
        is_papers_model=args.model == STABLE_DIFFUSION,
    )


def note_command(out: Path) -> None:
    """Add the command line to those that this folder was made by."""
    file = out / COMMANDS
    commands = file.read_text().splitlines() if file.exists() else []
    command = shlex.join(["python", *sys.argv])
    write_atomically(file, "\n".join(dict.fromkeys([*commands, command])).encode())


if __name__ == "__main__":
    main()
