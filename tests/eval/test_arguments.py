"""The commands refuse wrong values before the first image is drawn, in one sentence that names the value."""

import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import fid
import speed
from atc_eval.command_line import parse
from atc_eval.draw.images import Prompts
from atc_eval.draw.sampler import Sampler, Times
from atc_eval.draw.sets import check_folder_settings

ROOT = Path(__file__).parents[2]
OURS = re.compile(r"atc_eval(\.|$)|(comparison|display)$")
Refused = Callable[..., str]


@pytest.fixture
def experiment(model: Path, draw_images: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A command of fid.py that would draw, in a folder with files to name in the wrong places; nothing may be drawn."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(Sampler, "draw", lambda *_, **__: pytest.fail("something was drawn"))
    Path("names.txt").write_text("ant\nbee\ncat\n")
    Path("gap.txt").write_text("ant\n\ncat\n")
    Path("latin.txt").write_bytes("ant\nélan\n".encode("latin-1"))
    Path("file").touch()
    Path("empty").mkdir()
    draw_images("few", 3)
    Path("few/folder.png").mkdir()
    Path("few/dangling.png").symlink_to("nowhere")
    draw_images("damaged", 5)
    Path("damaged/3.png").write_bytes(Path("damaged/3.png").read_bytes()[:200])
    return (
        f"--model {model} --class-names names.txt --prompt {{}} --steps 2 --features efficientnet-lite0 --device cpu "
        f"--reference {draw_images('reference', 5)}"
    )


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ("--model /nonexistent", "there is no folder /nonexistent"),
        ("--model ./nonexistent", "there is no folder ./nonexistent"),
        ("--model empty", "cannot load 'empty': .*model_index.json"),
        ("--lora empty", "cannot load the LoRA 'empty': .*pytorch_lora_weights"),
        ("--model no/model", "cannot load 'no/model'"),
        ("--lora no/lora", "cannot load the LoRA 'no/lora': .*; if it was never downloaded, .*: hf download no/lora"),
        ("--reference nowhere", "there is no folder nowhere"),
        ("--reference few", "few needs at least 4 images, and has 3"),
        ("--reference damaged", r"unreadable images: damaged/3\.png$"),
        ("--report file", "--report file is a file; give a folder"),
        ("--out file", "file is a file; give a folder"),
        ("--out file/out", "file/out cannot be made, because .*file is a file"),
        ("--class-names nowhere.txt", "there is no file nowhere.txt"),
        ("--class-names empty", "empty is a folder; give a file"),
        ("--class-names gap.txt", "line 2 of gap.txt is empty"),
        ("--class-names latin.txt", "latin.txt is not text in UTF-8"),
        ("--prompt dog", "--prompt needs {} for the name of the class, got 'dog'"),
        ("--classes 4", "does not name different classes of 0..2"),
        ("--classes 1 --images-per-class 1", "1 image is too few to score; at least 4 are needed"),
        ("--show 3", "--show 3, but there are no images of that class"),
        ("--batch-size 0", "--batch-size must be a whole number from 1 up, got 0"),
        ("--size many", "invalid int value: 'many'"),
        ("--size 63", "--size must be a multiple of 8 from 8 up, got 63"),
        (f"--seed {2**64 - 11}", f"--seed {2**64 - 11} .* beyond 64 bits; give one closer to 0"),
        ("--guidance nan", "--guidance must be a finite number, got nan"),
        ("--set backend=triton --method atc --keep 50", "backend='triton' needs tokens on a CUDA device, got cpu"),
        ("--part 3", "such as 3/8, got '3'"),
        ("--part=", "such as 3/8, got ''"),
        ("--part 9/8", "such as 3/8, got '9/8'"),
        ("--bootstrap 1", "--bootstrap must be a whole number from 2 up, got 1"),
        ("--device cuda", "--device cuda, but the device here is cpu"),
        ("--features inception --inception-weights nowhere.pth", "there is no file nowhere.pth"),
    ],
)
def test_fid_draws_nothing(experiment: str, refused: Refused, wrong: str, text: str) -> None:
    assert re.search(text, refused(fid.main, f"{experiment} {wrong}".split()))
    assert not list(Path().glob("out/sets"))
    assert not list(Path().glob("out/settings.json"))


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("--nonsense 5", "error: unrecognized arguments: --nonsense 5"),
        ("--reference-images few", "error: unrecognized arguments: --reference-images few; did you mean --reference?"),
        ("--lists", "error: unrecognized arguments: --lists; did you mean --list?"),
        ("--batchsize=2", "error: unrecognized arguments: --batchsize=2; did you mean --batch-size?"),
    ],
)
def test_an_unknown_option_is_named_with_the_one_that_was_meant(refused: Refused, line: str, text: str) -> None:
    assert refused(fid.main, line.split()).endswith(text)


@pytest.mark.usefixtures("experiment")
def test_speed_measures_nothing(refused: Refused) -> None:
    assert "empty is a folder; give a file, such as empty/result.md" in refused(speed.main, ["--out", "empty"])


def test_a_byte_order_mark_is_no_part_of_a_name(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("ant\nbee\n", encoding="utf-8-sig")
    [prompts] = parse([Prompts], None, ["--class-names", str(tmp_path / "names.txt")])
    assert [each.prompt for each in prompts.plan()[::2]] == [
        f"A high quality photograph of a {name}." for name in ("ant", "bee")
    ]


def test_a_damaged_file_of_an_earlier_run_is_named_with_the_way_out(tmp_path: Path) -> None:
    for name in ("settings.json", "times.json"):
        (tmp_path / name).write_text('{"steps": ')
    with pytest.raises(ValueError, match=r"settings\.json is damaged .*; delete it and rerun the command"):
        check_folder_settings(tmp_path, {"steps": 2}, "*")
    with pytest.raises(ValueError, match=r"times\.json is damaged .*; delete it and rerun the command"):
        Times(tmp_path / "times.json")


@pytest.mark.parametrize(
    ("command", "package", "extra"),
    [
        ("eval/fid.py", "torch_fidelity", "eval"),
        ("eval/speed.py", "fastcluster", "eval"),
        ("eval/classify.py", "timm", "eval,vision"),
        ("examples/clusters.py", "matplotlib", "app"),
        ("examples/app.py", "gradio", "app"),
    ],
)
def test_a_package_that_is_not_installed_is_named_with_the_command_that_installs_it(
    command: str, package: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in filter(OURS.match, list(sys.modules)):
        monkeypatch.delitem(sys.modules, name)
    for name in [package, *(name for name in sys.modules if name.startswith(f"{package}."))]:
        monkeypatch.setitem(sys.modules, name, None)
    expected = f"{Path(command).name} needs the package {package}"
    with pytest.raises(SystemExit, match=f"^{expected}, which is not .*: pip install -e '.\\[{extra}\\]'$"):
        runpy.run_path(str(ROOT / command), run_name="__main__")
