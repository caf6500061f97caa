"""Where there is no CUDA device, Triton's kernels run in its interpreter; Triton reads that when it is imported."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
