"""The compiled max_pool: csrc/max_pool.cpp on the CPU, csrc/max_pool.cu on CUDA."""

from __future__ import annotations

import torch
from torch import Tensor

from cvkernels import backend, extension

DTYPES = {
    "cpu": (torch.float32, torch.float16, torch.bfloat16, torch.float64),
    "cuda": (torch.float32, torch.float16, torch.bfloat16),
}

extension.load()


def why_not(x: Tensor, device: str) -> str:
    """Why the compiled op cannot run on ``x`` as a tensor of ``device``; empty where it can."""
    if device not in DTYPES:
        return f"the native max_pool needs CPU or CUDA tensors, got {device}"
    if x.dtype not in DTYPES[device]:
        return f"the native max_pool has no {x.dtype} on {device}"
    if x.device.type == "meta":
        return ""
    if not extension.has(device):
        return extension.status()[device].reason
    return extension.lacks_gpu(backend.gpu(x)[1]) if device == "cuda" else ""
