"""What a newcomer runs: the README's code and the example, with the model that ships here."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import generate

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", README, re.DOTALL))
def test_the_readmes_code_runs_without_a_warning(block):
    """In a new process, where libraries warn that do so once only; in few steps, so that it is quick."""
    code = block.replace("num_inference_steps=20", "num_inference_steps=2")
    command = [sys.executable, "-W", "default", "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not re.search("warn|deprecated|expected types", done.stderr, re.IGNORECASE), done.stderr


def test_the_readmes_files_exist():
    links = re.findall(r"\]\(((?!http)[^)#]+)\)", README)
    assert links
    assert all((ROOT / link).exists() for link in links)


@pytest.mark.slow
@pytest.mark.parametrize("setting", [[], ["--r", "0.5", "--r-keys", "0.25", "--linkage", "ward"]])
def test_generate_draws_a_labelled_image_and_prints_the_fidelity(tmp_path, capsys, setting):
    out = tmp_path / "a.png"
    generate.main(["--steps", "2", "--size", "128", "--prompt", "fox", "--out", str(out), *setting])
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("compiling")]
    assert re.fullmatch(r"unmerged +[\d.]+ s per image", lines[0])
    names = [r"\(r=0.5, r_keys=0.25, linkage='ward'\)"] if setting else [r"fast\(\)", r"faster\(\)"]
    for name, line in zip(names, lines[1:-1], strict=True):
        match = re.fullmatch(rf"{name} +[\d.]+ s per image, [\d.]+ x, ([\d.]+) dB", line)
        assert match, line
        assert 15 < float(match[1]) < 70  # an unrelated image is at about 10 dB
    assert Image.open(out).size == (256 * (1 + len(names)), 44 + 256 + 84 + 256)


COUNT_COMPILATIONS = """
import generate
from atc_diffusion.clustering import on_compilation

def draw(pipe, args, config, steps, original=generate.draw):
    compiled = []
    with on_compilation(lambda: compiled.append(steps)):
        run = original(pipe, args, config, steps)
    print("compiled in", steps, "steps:", len(compiled))
    return run

generate.draw = draw
generate.main()
"""


@pytest.mark.slow
def test_on_a_fresh_installation_all_is_compiled_before_time_is_taken(tmp_path):
    options = ["--steps", "3", "--size", "64", "--prompt", "fox", "--r", "0.5"]
    done = subprocess.run(
        [sys.executable, "-c", COUNT_COMPILATIONS, *options],
        cwd=tmp_path,
        env=os.environ | {"NUMBA_CACHE_DIR": str(tmp_path / "numba"), "PYTHONPATH": f"{ROOT}:{ROOT / 'examples'}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("compiling (once)") == 1
    counts = [int(count) for count in re.findall(r"compiled in 3 steps: (\d+)", done.stdout)]
    assert counts == [0, 0]
    assert re.search(r"compiled in 2 steps: [1-9]", done.stdout)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--r", "0"], r"r is the (share|fraction) of tokens kept, in \(0, 1\], got 0"),
        (["--r", "50"], "did you mean 0.5"),
        (["--r-keys", "2"], "r_keys is"),
        (["--r", "half"], "invalid float value: 'half'"),
        (["--model", "no/such-model"], "cannot load 'no/such-model'"),
        (["--model", "/nonexistent"], "there is no folder /nonexistent"),
        (["--out", "picture"], "--out picture must end in .png or .jpg"),
        (["--out", "."], r"--out \. is a folder; give a file, such as result.png"),
        (["--out", f"{__file__}/a.png"], r"--out \S+/a.png cannot be made, because \S+test_examples\.py is a file"),
        (["--steps", "0"], "--steps must be a whole number from 1 up, got 0"),
        (["--size", "0"], "--size must be a multiple of 8 from 8 up, got 0"),
        (["--guidance", "nan"], "--guidance must be a finite number, got nan"),
        (["--size", "100"], "--size must be a multiple of 8 from 8 up, got 100"),
        (["--seed", str(2**64)], f"--seed must fit into 64 bits, got {2**64}"),
    ],
)
def test_generate_says_what_does_not_fit(tmp_path, monkeypatch, refused, options, message):
    monkeypatch.chdir(tmp_path)
    assert re.search(message, refused(generate.main, options))
    assert not list(tmp_path.iterdir())
