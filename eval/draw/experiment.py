"""The sets of pictures in an experiment's folder, and the commands that made them."""

import json
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from draw.configuration import Configuration
from draw.picture_set import PictureSet, read_stamp
from draw.pictures import Picture
from files import write_atomically

Sets = dict[Configuration, PictureSet]
COMMANDS = "commands.txt"


def make_sets(
    out: Path, configurations: Iterable[Configuration], pictures: Sequence[Picture], settings: dict[str, Any]
) -> Sets:
    """A set of `pictures` in the folder `out` for each configuration, whether drawn or not."""
    return {
        each: PictureSet(out / "sets" / each.folder, pictures, settings | {"way": each.json}) for each in configurations
    }


def complete_sets(out: Path, pictures: Sequence[Picture], settings: dict[str, Any]) -> Sets:
    """All sets in `out` that have all `pictures`, including those of earlier commands; the unmerged one first."""
    origins = [json.loads(read_stamp(path) or "{}") for path in out.glob(f"sets/*/{pictures[0].file}")]
    configurations = [Configuration.from_json(origin["way"]) for origin in origins if "way" in origin]
    sets = make_sets(out, sorted(configurations, key=_place), pictures, settings)
    return {each: pictures for each, pictures in sets.items() if not pictures.missing()}


def _place(configuration: Configuration) -> tuple[object, ...]:
    """The order in tables: unmerged, rivals, ToMe, ATC; within each from the largest share kept to the smallest."""
    label = configuration.label
    return not configuration.is_unmerged, label.startswith("ATC"), label, [-value for value in configuration.strength]


def note_command(out: Path) -> list[str]:
    """Add this command line to those that made the folder; returns all of them."""
    file = out / COMMANDS
    before = file.read_text().splitlines() if file.exists() else []
    commands = list(dict.fromkeys([*before, this_command()]))
    write_atomically(file, "\n".join(commands).encode())
    return commands


def this_command() -> str:
    return shlex.join(["python", *sys.argv])
