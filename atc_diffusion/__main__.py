"""Commands: `python -m atc_diffusion` checks merging on this machine, `... tune MODEL` finds a setting for a model."""

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from math import inf, isfinite
from pathlib import Path
from typing import Any

import torch

from atc_diffusion.commands import Several, check_file, check_finite, one_sentence, write_atomically
from atc_diffusion.devices import devices_found
from atc_diffusion.loading import load_lora, load_pipeline, make_scheduler, quiet
from atc_diffusion.tuning import Tuning, tune

NAME = "python -m atc_diffusion"
DTYPES = ("float32", "float16", "bfloat16")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog=NAME, description="Token merging for diffusers.")
    commands = parser.add_subparsers(dest="command", metavar="command")
    commands.add_parser("check", help="check merging on every device of this machine (the default); under a minute")
    _add_options(commands.add_parser("tune", help="find the fastest setting that keeps a model's images"))
    options = parser.parse_args(arguments)
    with one_sentence(NAME, extra="tune"):
        return _tune(options) if options.command == "tune" else _check()


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Draws your prompts without a patch, then with merging, forecast steps, fewer steps and combinations of these,"
        " and prints the fastest setting whose images are near enough, as code."
    )
    parser.add_argument("model", help="folder or hub id of a pipeline")
    parser.add_argument(
        "--prompts", action=Several, required=True, metavar="PROMPT", help="a few that are typical of yours"
    )
    parser.add_argument("--min-psnr", type=float, default=40.0, help="lowest PSNR, in dB (default: %(default)g)")
    parser.add_argument("--max-seconds", type=float, default=inf, help="begin no image after that (default: no limit)")
    parser.add_argument("--steps", type=_count, help="denoising steps (default: the pipeline's own)")
    parser.add_argument("--guidance", type=float, help="classifier-free guidance scale (default: the pipeline's own)")
    parser.add_argument("--size", type=_count, help="height and width in pixels (default: the model's own)")
    parser.add_argument("--image", type=Path, help="image to start from, for image-to-image (default: noise)")
    parser.add_argument("--batch-size", type=_count, default=1, help="images per prompt (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the first prompt (default: %(default)s)")
    parser.add_argument("--lora", help="folder or hub id of a LoRA for the model (default: none)")
    parser.add_argument("--scheduler", help="name of a scheduler class of diffusers (default: the model's own)")
    parser.add_argument("--dtype", choices=DTYPES, help="of the model (default: float16; float32 on the CPU)")
    parser.add_argument("--device", help="such as cpu, cuda or mps (default: the fastest)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the measurements to a JSON file, too")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with the images, too")


def _count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 up, got {text!r}")
    return int(text)


def _check() -> int:
    from atc_diffusion.checks import run_check

    return run_check()


def _tune(options: argparse.Namespace) -> int:
    from atc_diffusion.checks import describe_machine

    check_finite("--guidance", options.guidance)
    check_file("--json", options.json)
    check_file("--html", options.html)
    if options.html:  # a missing package is named before anything is drawn
        from atc_diffusion.tuning_page import make_page
    device = _device(options.device)
    names = {"num_inference_steps": "steps", "guidance_scale": "guidance", "height": "size", "width": "size"}
    call = {name: value for name, option in names.items() if (value := getattr(options, option)) is not None}
    with quiet():
        pipe, call = _pipeline(options, device, call | {"num_images_per_prompt": options.batch_size})
        limits = {"min_psnr": options.min_psnr, "max_seconds": options.max_seconds, "seed": options.seed}
        tuning = tune(pipe, options.prompts, on_progress=_say, **limits, **call)
    print(tuning)
    command, machine = f"{NAME} {shlex.join(sys.argv[1:])}", ", ".join(describe_machine([device]))
    about = {"command": command, "machine": machine, "dtype": str(pipe.dtype).removeprefix("torch.")}
    if options.json:
        found = about | {"min_psnr": tuning.min_psnr, "note": tuning.note, "results": _results(tuning)}
        write_atomically(options.json, (json.dumps(found, indent=1) + "\n").encode())
    if options.html:
        write_atomically(options.html, make_page(tuning, about).encode())
    return 0


def _device(name: str | None) -> torch.device:
    found = devices_found()
    kind, colon, number = (name or "").partition(":")
    if name and (kind not in {device.type for device in found} or (colon and not number.isdecimal())):
        raise ValueError(f"there is no device {name!r} here, only {' and '.join(map(str, found))}")
    return torch.device(name) if name else found[-1]


def _pipeline(options: argparse.Namespace, device: torch.device, call: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The pipeline on its device, and the arguments of its call."""
    dtype = options.dtype or ("float32" if device.type == "cpu" else "float16")
    pipe = load_pipeline(options.model, getattr(torch, dtype))
    if options.lora:
        load_lora(pipe, options.lora)
    if options.scheduler:
        pipe.scheduler = make_scheduler(options.scheduler, pipe.scheduler)
    if options.image:
        pipe, call = _from_image(pipe, options.image, call)
    return pipe.to(device), call


def _from_image(pipe: Any, path: Path, call: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The image-to-image pipeline made of `pipe`, and arguments of its call that start from the image at `path`."""
    from diffusers import AutoPipelineForImage2Image
    from PIL import Image

    with Image.open(path) as file:
        image = file.convert("RGB")
    others = {name: value for name, value in call.items() if name not in ("height", "width")}
    if "height" in call:
        image = image.resize((call["width"], call["height"]))
    others["image"] = [image] * call["num_images_per_prompt"]
    return AutoPipelineForImage2Image.from_pipe(pipe), others


def _results(tuning: Tuning) -> list[dict[str, Any]]:
    return [
        {
            "setting": str(row.setting),
            "config": row.setting.config and asdict(row.setting.config),
            "num_inference_steps": row.setting.num_inference_steps,
            "seconds": row.seconds,
            "ratio": row.ratio,
            "psnr": row.psnr if isfinite(row.psnr) else None,
            "prompts": row.num_prompts,
        }
        for row in tuning.rows
    ]


def _say(label: str, done: int, total: int) -> None:
    print(f"{done} of {total}: {label}" if total else label, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
