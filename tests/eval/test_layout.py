"""eval/ and examples/ use the public API of the package alone, and no two of their files have one name."""

import ast
from collections import Counter
from pathlib import Path

import pytest

import atc_diffusion

ROOT = Path(__file__).parents[2]
MODULES = ("clustering", "commands", "loading", "painting", "tuning_page")
PUBLIC = {"atc_diffusion", *(f"atc_diffusion.{name}" for name in MODULES)}
FILES = [*ROOT.glob("eval/**/*.py"), *ROOT.glob("examples/**/*.py")]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_a_file_imports_only_what_the_package_makes_public(file: Path) -> None:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "atc_diffusion":
            assert node.module in PUBLIC, node.module
            assert not [name.name for name in node.names if name.name.startswith("_")]
            if node.module == "atc_diffusion":
                assert {name.name for name in node.names} <= set(atc_diffusion.__all__)


def test_every_file_has_a_name_of_its_own() -> None:
    names = Counter(file.name for file in FILES if file.name != "__init__.py")
    assert [name for name, count in names.items() if count > 1] == []
