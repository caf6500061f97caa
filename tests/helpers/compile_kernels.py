"""Compile what a clustering launches, for a GPU that need not be there.

    python -m tests.helpers.compile_kernels 90 average 80 ward

Prints one line per kernel: compute capability, linkage, step and the bytes of shared memory that it takes. Must run
without Triton's interpreter, which does not compile (`TRITON_INTERPRET=0`).
"""

import sys
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from atc_diffusion.clustering import _triton, check_choices

TYPES = {torch.float32: "*fp32", torch.int32: "*i32", torch.int64: "*i64"}

Launch = tuple[tuple[Any, ...], dict[str, Any]]


class Recorder:
    """Stands in for a kernel and keeps the arguments of its launches, the last of every step."""

    def __init__(self) -> None:
        self.launches: dict[str, Launch] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args, **options: self.launches.update({options["STEP"]: (args, options)})


def launches(linkage: str, capability: int) -> dict[str, Launch]:
    """By step, for 4096 tokens of 320 channels."""
    recorder = Recorder()
    precision = "tf32x3" if capability >= 80 else "ieee"
    with mock.patch.multiple(_triton, kernel=recorder, precision=lambda device: precision):
        _triton.build_tree(torch.zeros(1, 4096, 320), 1024, linkage, check_choices(linkage))
    return recorder.launches


def compile_launch(args: tuple[Any, ...], options: dict[str, Any], capability: int) -> Any:
    """As the just-in-time compiler does it, which would ask for a GPU."""
    names = _triton.kernel.arg_names
    constants = {name: value for name, value in options.items() if name in names}
    types = [TYPES[arg.dtype] if isinstance(arg, torch.Tensor) else "i32" for arg in args]
    signature = dict(zip(names, types, strict=False)) | dict.fromkeys(constants, "constexpr")
    aligned = [i for i, arg in enumerate(args) if isinstance(arg, torch.Tensor) or arg % 16 == 0]
    source = ASTSource(
        _triton.kernel,
        signature,
        {(names.index(name),): value for name, value in constants.items()},
        {(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    compiling = {name: value for name, value in options.items() if name not in names}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=compiling)


if __name__ == "__main__":
    for capability, linkage in zip(map(int, sys.argv[1::2]), sys.argv[2::2], strict=True):
        for step, (args, options) in launches(linkage, capability).items():
            print(capability, linkage, step, compile_launch(args, options, capability).metadata.shared)
