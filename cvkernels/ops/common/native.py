"""Where the compiled ops can run: csrc/<op>/cpu.cpp, and csrc/<op>/cuda.cu on CUDA."""

from __future__ import annotations

import torch
from torch import Tensor

from cvkernels import backend as backends
from cvkernels import extension, record
from cvkernels.backend import BackendError, Choice
from cvkernels.ops.common.autograd import needs_grad

DTYPES = {
    "cpu": (torch.float32, torch.float16, torch.bfloat16, torch.float64),
    "cuda": (torch.float32, torch.float16, torch.bfloat16),
}

REQUESTED = Choice("native", "requested")
COMPILED = {device: Choice("native", f"compiled for {device}") for device in DTYPES}

# What a compiled op raises on arguments that it does not take.
REFUSED = (RuntimeError, KeyError, TypeError, IndexError)

extension.load()


def select(op: str, x: Tensor, requested: str, forbids: str = "") -> Choice:
    """The backend of a call on ``x`` of an op that has a native one and the reference.

    "auto" leaves the call to the reference where the native op cannot run it, for the reason
    ``forbids`` where that is not empty, and on CPU tensors under torch.compile.
    """
    if requested == "reference":
        return Choice("reference", "requested")
    if requested not in ("auto", "native"):
        raise BackendError(
            f"{op}: there is no backend {requested!r}; use 'auto', 'native' or 'reference'"
        )
    device = backends.device_type(x)
    if forbids:
        reason = forbids
    elif requested == "auto" and device == "cpu" and torch.compiler.is_compiling():
        reason = "torch.compile generates the op on CPU"
    else:
        reason = why_not(op, x, device)
    if not reason:
        return REQUESTED if requested == "native" else COMPILED[device]
    if requested == "native":
        raise BackendError(
            f"{op}: backend 'native' cannot run this call: {reason}; "
            f"use backend='auto' or 'reference'"
        )
    return Choice("reference", reason)


def at_once(backend: str, *tensors: Tensor | None) -> bool:
    """Whether the op may be called on CPU before the checks in Python: it refuses what they refuse.

    So where "auto" means that op, there is no gradient, and nobody has to see the call. Checking in
    Python takes longer than a small map. What it refuses, by one of ``REFUSED``, is to be checked.
    """
    # Written out: in cold caches each function that is called takes longer than what it does.
    if (
        backend != "auto"
        or torch.compiler.is_compiling()
        or backends.in_force() != "auto"
        or record.current() is not None
        or not extension.has("cpu")
        or (torch.is_grad_enabled() and needs_grad(tensors))
    ):
        return False
    for tensor in tensors:
        if tensor is not None and not tensor.is_cpu:
            return False
    return True


def why_not(op: str, x: Tensor, device: str) -> str:
    """Why the compiled op cannot run on ``x`` as a tensor of ``device``; empty where it can."""
    if device not in DTYPES:
        return f"the native {op} needs CPU or CUDA tensors, got {device}"
    if x.dtype not in DTYPES[device]:
        return f"the native {op} has no {x.dtype} on {device}"
    if x.device.type == "meta":
        return ""
    if not extension.has(device):
        return extension.status()[device].reason
    return extension.lacks_gpu(backends.gpu(x)[1]) if device == "cuda" else ""


def mark_written(out: Tensor) -> None:
    """Tell autograd that an op wrote into ``out``: whoever saved it for a backward must hear it.

    A graph under torch.compile knows by the op's schema.
    """
    tracing = torch.compiler.is_compiling()
    if torch.is_grad_enabled() and not tracing and not out.is_inference():
        torch.autograd.graph.increment_version(out)
