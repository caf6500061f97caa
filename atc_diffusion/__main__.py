"""Commands: `python -m atc_diffusion` checks merging on this machine, `... tune MODEL` finds a setting for a model."""

import argparse
import sys
from typing import Any


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m atc_diffusion", description="Token merging for diffusers.")
    commands = parser.add_subparsers(dest="command", metavar="command")
    commands.add_parser("check", help="check merging on every device of this machine (the default); under a minute")
    _add_options(commands.add_parser("tune", help="find the fastest setting that keeps a model's pictures"))
    options = vars(parser.parse_args(arguments))
    try:
        return _tune(**options) if options.pop("command") == "tune" else _check()
    except ValueError as error:
        sys.exit(f"python -m atc_diffusion: {error}")


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="hub id or folder of a text-to-image pipeline")
    parser.add_argument("--prompt", nargs="+", required=True, help="a few prompts that are typical of yours")
    parser.add_argument("--steps", type=int, help="denoising steps (default: the pipeline's own)")
    parser.add_argument("--guidance", type=float, help="classifier-free guidance scale (default: the pipeline's own)")
    parser.add_argument("--size", type=int, help="height and width in pixels (default: the model's own)")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], help="(default: float16, CPU: float32)")
    parser.add_argument("--min-psnr", type=float, default=40.0, help="least PSNR in dB (default: 40)")
    parser.add_argument("--max-seconds", type=float, default=float("inf"), help="begin no picture after that")


def _check() -> int:
    from atc_diffusion.checks import run_check

    return run_check()


def _tune(model: str, prompt: list[str], dtype: str | None, min_psnr: float, max_seconds: float, **given: Any) -> int:
    import torch

    from atc_diffusion.devices import devices_found
    from atc_diffusion.loading import load_pipeline
    from atc_diffusion.tuning import tune

    device = devices_found()[-1]
    dtype = dtype or ("float32" if device.type == "cpu" else "float16")
    pipe = load_pipeline(model, getattr(torch, dtype)).to(device)
    names = {"num_inference_steps": "steps", "guidance_scale": "guidance", "height": "size", "width": "size"}
    call = {name: given[option] for name, option in names.items() if given[option] is not None}
    print(tune(pipe, prompt, min_psnr=min_psnr, max_seconds=max_seconds, on_progress=_say, **call))
    return 0


def _say(label: str, done: int, total: int) -> None:
    print(f"{done} of {total}: {label}" if total else label, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
