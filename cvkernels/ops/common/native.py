"""Where the compiled ops can run, and their work without PyTorch's dispatcher on the CPU."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from cvkernels import backend as backends
from cvkernels import extension, record
from cvkernels.ops.common import autograd
from cvkernels.ops.common.dispatch import Call
from cvkernels.ops.common.plan import Plan

DTYPES = {
    "cpu": (torch.float32, torch.float16, torch.bfloat16, torch.float64),
    "cuda": (torch.float32, torch.float16, torch.bfloat16),
}

extension.load()


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


def compiled_for(problem: object, call: Call) -> str:
    return f"compiled for {call.device}"


def lacks(op: str, call: Call) -> str:
    """Why a compiled op with all of ``DTYPES`` cannot run the call; empty where it can."""
    if call.automatic and call.device == "cpu" and torch.compiler.is_compiling():
        return "torch.compile generates the op on CPU"
    return why_not(op, call.x, call.device)


def directs(call: Call) -> bool:
    """Whether a plan of the call may do an op's work past PyTorch's dispatcher."""
    if call.once:
        if not torch.compiler.is_compiling():
            autograd.has_dispatch_modes()  # one that counts operations learns the op's
        return False
    return (
        call.device == "cpu"
        and call.x.is_cpu
        and type(call.x) in (Tensor, Parameter)
        and not autograd.observed()
    )


def direct(function: Callable[[], object]) -> Callable[..., None]:
    """The work of the one compiled op that ``function`` calls, as a function of addresses.

    Of all its tensors in the order of the schema, 0 for one that is absent, and of its result last.
    """
    return importlib.import_module("cvkernels._C").direct(function)


# Whether the bytecode at hand is traced, in which no kept call could be looked for. What else
# compiles has tensors of other classes.
is_traced = torch.compiler.is_dynamo_compiling


def keeps_calls(tensors: int) -> Any:
    """The last kinds of calls of an op on so many tensors, found and run in one native call.

    ``kept(*tensors, *options)`` is the op's result, or None where no call like it is kept, or
    something around it counts: :func:`autograd.observed`, ``explain``, ``backend.use``, a gradient
    that is needed. :func:`keep_call` keeps one.
    """
    if not extension.has("cpu"):
        return lambda *_: None
    # All of observed() but for transforms, whose tensors the call knows itself.
    surroundings = (
        autograd._dispatch_modes, autograd._tracer, autograd._function_mode, autograd._profiler
    )  # fmt: skip
    return importlib.import_module("cvkernels._C").KeptCalls(
        tensors, (backends.UNREQUESTED, record.UNSEEN), surroundings, (Tensor, Parameter)
    )


def recipe(
    work: Callable[..., None],
    tensors: tuple[Tensor | None, ...],
    made: tuple[Tensor, ...],
    results: tuple[Tensor, ...],
) -> object | None:
    """How the work of one op, see :func:`direct`, is done for tensors like these.

    ``made`` are made anew in each call, ``results`` are what it returns: tensors of both, or views
    of the last that is made. None of them is held. None before torch 2.14.
    """
    return importlib.import_module("cvkernels._C").KeptCalls.recipe(work, tensors, made, results)


def keep_call(kept: Any, planned: Plan, *options: object) -> None:
    """Let ``kept`` run calls like the one planned, if its work needs nothing but data."""
    how = getattr(planned.run, "recipe", None)
    if how is not None:
        kept.keep(how, options)


def template(out: Tensor) -> Tensor:
    """A tensor without memory, which ``torch.empty_like`` takes out's strides from."""
    like = torch.empty_like(out)
    like.untyped_storage().resize_(0)
    return like


def writes(library: torch.library.Library, *ops: str) -> None:
    """Register fakes of ops that write into their arguments and return nothing."""
    for op in ops:
        torch.library.register_fake(f"cvkernels::{op}", lambda *_: None, lib=library)
