"""Which backend runs a call of se_scale or of one of its parts, and how it runs and reports."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cvkernels import backend as backends
from cvkernels import record
from cvkernels.backend import BackendError, Choice
from cvkernels.ops.common.traffic import Traffic
from cvkernels.ops.squeeze_excite import native

IMPLEMENTATIONS = ("triton", "native")
TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

LARGEST_MAP = 2**31 - 2**13


def select(op: str, x: Tensor, grad: bool, requested: str, triton_limit: str = "") -> Choice:
    """The backend of a checked call; ``triton_limit`` says why Triton cannot run it, if so."""
    if requested == "reference":
        return Choice("reference", "requested")
    if requested not in ("auto", *IMPLEMENTATIONS):
        raise BackendError(
            f"{op}: there is no backend {requested!r}; use 'auto', 'triton', 'native' or "
            f"'reference'"
        )
    device = backends.device_type(x)
    if requested == "auto":
        name = "native" if device == "cpu" else "triton"
    else:
        name = requested
    triton_limit = triton_limit or _too_large(x)
    reason = _why_not(op, x.dtype, device, grad, name, triton_limit)
    if not reason and requested == "auto" and name == "native" and torch.compiler.is_compiling():
        reason = "torch.compile generates the op on CPU"
    if not reason:
        return Choice(name, "requested" if requested == name else f"{name} on {device}")
    if requested != "auto":
        raise BackendError(
            f"{op}: backend {requested!r} cannot run this call: {reason}; "
            f"use backend='auto' or 'reference'"
        )
    return Choice("reference", reason)


def _why_not(
    op: str, dtype: torch.dtype, device: str, grad: bool, name: str, triton_limit: str
) -> str:
    if name == "native":
        if grad:
            return f"a gradient is needed, and the native {op} has none"
        return native.why_not(dtype, device)
    if dtype not in TRITON_DTYPES:
        return f"Triton computes in float16, bfloat16 and float32, got {dtype}"
    # A compiled graph asks when it runs; tracing cannot.
    return triton_limit or ("" if torch.compiler.is_compiling() else backends.lacks_triton(device))


def _too_large(x: Tensor) -> str:
    pixels = x.shape[2:].numel()
    return "" if pixels <= LARGEST_MAP else f"Triton counts pixels in 32 bits, got {pixels}"


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd has to see the call."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def registered_backend(choice: Choice, backend: str) -> str:
    """What a registered op is asked for: a compiled graph chooses when it runs."""
    if torch.compiler.is_compiling():
        return backends.requested(backend, IMPLEMENTATIONS)
    return choice.backend


def run(
    op: str,
    choice: Choice,
    fused: Callable[[], Tensor],
    reference: Callable[[], Tensor],
    traffic: Callable[[], Traffic],
) -> Tensor:
    """Run a call on the chosen backend; ``explain`` hears of it."""
    recorder = record.active()
    if choice.backend == "reference":
        if recorder is None:
            return reference()
        with recorder.fallback(f"{op}: {choice.reason}"):
            return reference()
    if recorder is None:
        return fused()
    with recorder.call(op, choice.backend, choice.reason, *traffic()):
        return fused()


def nbytes(*tensors: Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)
