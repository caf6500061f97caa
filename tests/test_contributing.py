"""The map in CONTRIBUTING.md: it names every part of the package, and imports go where it lets them."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "atc_diffusion"
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
MAP = dict(re.findall(r"^\| `([\w./]+)` \| [^|]+ \| ([^|]+) \|$", TEXT, re.MULTILINE))


def named(text: str) -> set[str]:
    return set(re.findall(r"`([^`]+)`", text))


def below(part: str) -> set[str]:
    order = list(MAP)
    return set(order[order.index(part) + 1 :])


def allowed(part: str) -> set[str]:
    """What the last column of the map lets a part import."""
    return below(part) if MAP[part] == "all below" else named(MAP[part])


def part_of(path: Path) -> str:
    """The row of the map that a file or folder belongs to."""
    first = path.relative_to(PACKAGE).parts[0]
    return f"{first}/" if (PACKAGE / first).is_dir() else first


def modules(file: Path) -> Iterator[str]:
    """What a file imports, at its top or inside a function, with the names that it takes from modules."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imported(file: Path) -> set[str]:
    """The parts of the package that a file imports."""
    ours = [ROOT.joinpath(*name.split(".")) for name in modules(file) if name.startswith("atc_diffusion.")]
    paths = [(path, path.with_suffix(".py"), path.parent, path.parent.with_suffix(".py")) for path in ours]
    return {part_of(next(path for path in each if path.exists())) for each in paths}


def test_every_part_of_the_package_is_in_the_map():
    parts = {f"{path.name}/" for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    assert set(MAP) == parts | {path.name for path in PACKAGE.glob("*.py")} - {"__init__.py"}


@pytest.mark.parametrize("part", MAP)
def test_what_a_part_may_import_is_below_it(part):
    assert allowed(part) <= below(part)


@pytest.mark.parametrize("part", MAP)
def test_a_part_imports_only_what_the_map_lets_it(part):
    path = PACKAGE / part
    files = path.rglob("*.py") if path.is_dir() else [path]
    assert set().union(*map(imported, files)) - {part} <= allowed(part)


def test_the_folders_around_the_package_are_in_the_map():
    [tests] = re.findall(r"^\| `tests/` \| (.+) \|$", TEXT, re.MULTILINE)
    folders = {f"{path.parent.name}/" for path in (ROOT / "tests").glob("*/__init__.py")}
    assert folders - set(MAP) == named(tests)
    assert all((ROOT / folder).is_dir() for folder in re.findall(r"^\| `(\w+/)` \| [^|]+ \|$", TEXT, re.MULTILINE))


def test_it_is_short():
    assert len(TEXT.splitlines()) <= 120
