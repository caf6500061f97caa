"""The rooms of eval/, and that each imports only those below it."""

import ast
from pathlib import Path

import pytest

EVAL = Path(__file__).parents[2] / "eval"
BELOW = {  # arguments: options and their checks; draw: pictures; score: their scores; report: tables, plots and pages
    "arguments": {"files"},
    "draw": {"arguments", "files", "machine"},
    "score": {"arguments", "files", "draw"},
    "report": {"arguments", "files", "machine", "draw", "score"},
    "classification": {"arguments", "files", "machine", "draw", "score", "report"},
    "benchmark": {"arguments", "machine", "draw"},
}


def imported(file: Path) -> set[str]:
    """The names in eval/ that `file` imports from."""
    froms = [node.module or "" for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ImportFrom)]
    return {module.partition(".")[0] for module in froms} & {path.stem for path in EVAL.iterdir()}


@pytest.mark.parametrize("room", BELOW)
def test_a_room_imports_only_those_below_it(room: str) -> None:
    files = list((EVAL / room).glob("*.py"))
    assert files
    assert set().union(*map(imported, files)) - {room} <= BELOW[room]


def test_every_room_has_its_place() -> None:
    assert {path.parent.name for path in EVAL.glob("*/*.py")} == set(BELOW)
