"""Commands: `python -m atc_diffusion` checks merging on this machine."""

import argparse
import sys


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m atc_diffusion", description="Token merging for diffusers.")
    commands = parser.add_subparsers(dest="command", metavar="command")
    commands.add_parser("check", help="check merging on every device of this machine (the default); under a minute")
    parser.parse_args(arguments)
    return _check()


def _check() -> int:
    from atc_diffusion.check import run_check

    return run_check()


if __name__ == "__main__":
    sys.exit(main())
