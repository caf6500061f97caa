"""The commands on every model family: Stable Diffusion XL, 3, PixArt and Flux at tiny size."""

from collections.abc import Callable
from pathlib import Path

import pytest

import generate
from fid import main as fid
from tests.helpers import tiny_pipelines

FAMILIES = ("sdxl", "sd3", "pixart", "flux")


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("models") / request.param
    getattr(tiny_pipelines, request.param)().save_pretrained(folder)
    return folder


@pytest.fixture
def experiment(model: Path, draw_images: Callable[..., Path], tmp_path: Path) -> list[str]:
    names = tmp_path / "names.txt"
    names.write_text("ant\nbee\n")
    methods = "atc --keep 100/50" if model.name == "flux" else "atc tome --keep 50"
    return (
        f"--model {model} --class-names {names} --prompt {{}} --steps 2 --size 64 --batch-size 1 --method {methods} "
        f"--reference {draw_images('reference', 4)} --features efficientnet-lite0 --bootstrap 20 --device cpu "
        f"--out {tmp_path / 'out'}"
    ).split()


@pytest.mark.slow
def test_fid_draws_and_reports(experiment: list[str], tmp_path: Path) -> None:
    is_flux = "100/50" in experiment
    fid([*experiment, "--rival", "steps:0.5", *([] if is_flux else ["todo:2"])])
    report = (tmp_path / "out" / "report.md").read_text()
    others = [] if is_flux else ["ToMeConfig()", "ToDo"]
    assert all(method in report for method in ("unmerged", "ATCConfig()", "fewer steps", *others))


@pytest.mark.parametrize("model", ["sd3", "pixart"], indirect=True)
def test_rivals_that_need_a_unet_are_refused_before_anything_is_drawn(experiment: list[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"deepcache needs a UNet, and \w+Pipeline has none; leave it out"):
        fid([*experiment, "--rival", "deepcache:2"])
    assert not list((tmp_path / "out").rglob("*.png"))


def test_generate_draws_beside_the_unmerged_image(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "generate.png"
    keep = "--r-keys 0.25" if model.name == "flux" else "--r 0.5 --r-keys 0.25"
    generate.main(f"--model {model} --steps 2 --size 64 --prompt ant {keep} --out {out}".split())
    assert "r_keys=0.25" in capsys.readouterr().out
    assert out.is_file()
