"""Which implementation runs a call of an op, and why.

``"auto"`` follows the rule in the op's docstring; any other name runs that implementation or raises
:class:`BackendError`. A choice depends on the call's arguments and on :func:`use`, on nothing else.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import inspect
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from cvkernels import record

Backend = Literal["auto", "reference", "triton", "native", "cuda", "cudnn", "halo", "onednn"]
NAMES: tuple[str, ...] = get_args(Backend)

_requested: ContextVar[str] = ContextVar("cvkernels_backend", default="auto")
# What :func:`use` asks for, "auto" outside of it; not for traced code.
in_force = _requested.get
# The context of a call that nothing is requested for.
UNREQUESTED = (_requested, "auto")
# What torch.compile sees and guards on: before torch 2.14 it cannot trace a ContextVar.
_traced_request = "auto"


_plans: dict[str, Callable[..., Any]] = {}


class BackendError(RuntimeError):
    """The requested backend cannot run this call; the message says why and what can."""


class Choice(NamedTuple):
    """The implementation that runs a call, and the rule that chose it."""

    backend: str
    reason: str


@contextlib.contextmanager
def use(backend: Backend) -> Iterator[None]:
    """Request ``backend`` for the ops called inside the ``with`` block, in this thread or task.

    It binds every op that has such an implementation, which then runs or raises; an op that has
    none (no ``"triton"`` of max_pool, say) stays at "auto". A call's own ``backend=`` argument wins
    over it unless that argument is ``"auto"``.

    Raises:
        ValueError: backend is not one of :data:`NAMES`.
    """
    global _traced_request
    token = _requested.set(_checked(backend))
    outer, _traced_request = _traced_request, backend
    try:
        yield
    finally:
        _requested.reset(token)
        _traced_request = outer


def requested(backend: str, implementations: tuple[str, ...], op: str = "") -> str:
    """The backend in force for a call with this ``backend=``, of an op with these fused ones."""
    if _checked(backend, op) != "auto":
        return backend
    used = _traced_request if torch.compiler.is_compiling() else _requested.get()
    return used if used == "reference" or used in implementations else "auto"


def chosen(op: str, *args: Any, **kwargs: Any) -> str:
    """The backend that ``cvkernels.functional.<op>(*args, **kwargs)`` would run.

    Raises:
        ValueError: there is no such op, or the arguments are not valid for it.
        BackendError: the requested backend cannot run this call.
    """
    if op not in _plans:
        raise ValueError(f"chosen: there is no op named {op!r} in cvkernels.functional")
    plan = _plans[op]
    examples = inspect.signature(plan).parameters
    named = {f"{k}_like" if f"{k}_like" in examples else k: v for k, v in kwargs.items()}
    return plan(*args, **named).backend


def answers(op: str, plan: Callable[..., Any]) -> None:
    """Let :func:`chosen` ask ``plan``, which takes the arguments of the public op ``op``."""
    _plans[op] = plan


def device_type(x: Tensor) -> str:
    """The device type a call on ``x`` is planned for: CUDA for meta tensors under ``explain``."""
    device = x.device.type
    if device == "meta" and (recorder := record.active()) is not None:
        return recorder.meta_device
    return device


def gpu(x: Tensor) -> tuple[str, tuple[int, int]]:
    """Name and compute capability of the GPU that a call on ``x`` is planned for.

    A meta tensor stands for one on a Hopper GPU.
    """
    if x.device.type != "cuda":
        return "NVIDIA H200", (9, 0)
    return _gpu(x.device.index)


@functools.cache
def _gpu(index: int) -> tuple[str, tuple[int, int]]:
    return torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)


@functools.cache
def lacks_triton(device_type: str) -> str:
    """Why Triton kernels cannot run on tensors of ``device_type``; empty where they can.

    Triton's interpreter runs them on CPU tensors, when it is asked for by name.
    """
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    if device_type in ("cpu", "cuda"):
        try:
            import triton
        except Exception as error:  # noqa: BLE001 - a broken package may raise anything at import
            return f"Triton does not import: {type(error).__name__}: {' '.join(str(error).split())}"
        if device_type == "cuda" or triton.knobs.runtime.interpret:
            return ""
    return f"Triton needs CUDA tensors, got {device_type}"


def _checked(backend: str, op: str = "") -> str:
    if not isinstance(backend, str) or backend not in NAMES:
        of = f"{op}: " if op else ""
        raise ValueError(f"{of}backend must be one of {list(NAMES)}, got {backend!r}")
    return backend
