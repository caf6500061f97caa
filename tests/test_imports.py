"""What is imported, and when."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

HEAVY = ("accelerate", "diffusers", "matplotlib", "numba", "scipy", "timm", "torchvision", "transformers")
TINY_UNET = """
from diffusers import UNet2DConditionModel
unet = UNet2DConditionModel(block_out_channels=(4, 4), norm_num_groups=4, cross_attention_dim=4, attention_head_dim=2,
    down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2)
"""


def imported_by(code: str) -> set[str]:
    """The modules that are there after `code`, in an interpreter of its own, besides those of torch alone."""
    report = "import torch, sys; torchs = set(sys.modules)\n{}\nprint(*sys.modules.keys() - torchs)"
    command = [sys.executable, "-c", report.format(code)]
    root = Path(__file__).parents[1]
    return set(subprocess.run(command, check=True, capture_output=True, text=True, cwd=root).stdout.split())


def heavy(modules: set[str]) -> set[str]:
    return {name for name in modules if name.split(".")[0] in HEAVY}


def imported_at_once(file: Path) -> Iterator[str]:
    """What the top level of a file imports, with what it imports from there."""
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_no_file_that_the_package_itself_imports_imports_more_than_torch():
    root, files, names = Path(__file__).parents[1], [Path("atc_diffusion/__init__.py")], set()
    for file in files:  # which grow meanwhile
        names |= (new := set(imported_at_once(root / file)))
        paths = [Path(*name.split(".")) for name in new if name.startswith("atc_diffusion.")]
        found = {each for path in paths for each in (path.with_suffix(".py"), path.parent.with_suffix(".py"))}
        found |= {path / "__init__.py" for each in paths for path in (each, each.parent)}
        files += [each for each in found if (root / each).exists() and each not in files]
    assert "atc_diffusion.adapters.lookup.family_of" in names
    assert not heavy(names)


@pytest.mark.slow
def test_the_package_itself_needs_torch_alone_also_to_refuse_a_model_of_no_family():
    code = """
import atc_diffusion
atc_diffusion.ATCConfig.fast(), atc_diffusion.agglomerate, atc_diffusion.MergeMap
assert "torch._dynamo" not in sys.modules, "takes as long as the rest of torch"
try:
    atc_diffusion.apply_patch(torch.nn.Linear(1, 1))
except ValueError as error:
    assert "Linear has no self-attention that can be merged" in str(error)
else:
    raise AssertionError
"""
    assert not heavy(imported_by(code))


@pytest.mark.slow
def test_patching_imports_the_adapter_of_the_models_family_alone():
    adapters = imported_by(f"{TINY_UNET}\nimport atc_diffusion; atc_diffusion.apply_patch(unet)")
    assert "atc_diffusion.adapters.unet" in adapters
    assert "atc_diffusion.adapters.sd3" not in adapters


def test_no_test_file_imports_from_another():
    files = list(Path(__file__).parent.rglob("test_*.py"))
    assert files
    for file in files:
        froms = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ImportFrom)]
        names = {part for node in froms for name in node.names for part in [*(node.module or "").split("."), name.name]}
        assert not [name for name in names if f"{name}.py" in {other.name for other in files}], file
