"""The sizes of a call of se_scale or one of its parts, its checks, and which backend can run it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cvkernels import backend as backends
from cvkernels import extension
from cvkernels.ops.common import layout
from cvkernels.ops.common.arguments import (
    check_not_differentiable,
    check_out,
    check_residual,
    check_tensors,
)
from cvkernels.ops.common.dispatch import Call, Implementation, Table, call_of, reference

# The two weights, each before its bias.
Layers = tuple[Tensor, Tensor | None, Tensor, Tensor | None]

TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LARGEST_MAP = 2**31 - 2**13
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
ACTS = ("relu", "silu")
OUT_ACTS = ("none", "relu", "silu")
IN_PLACE = ("x", "residual")  # what out may be itself


class Problem(NamedTuple):
    """What a call of one of the ops has beside its first argument; the tensors are examples."""

    op: str
    layers: Any = ()  # Layers, where the op has some
    act: str = "relu"  # between the layers
    gate: Tensor | None = None
    residual: Tensor | None = None
    out_act: str = "none"  # behind the residual
    out: Tensor | None = None
    sigmoid: bool = False
    pixels: int | None = None  # whose sums are given for their mean

    @property
    def R(self) -> int:
        """Width of the hidden layer; 0 without one."""
        return self.layers[0].shape[0] if self.layers else 0

    @property
    def K(self) -> int:
        """Outputs of the second layer; 0 without one."""
        return self.layers[2].shape[0] if self.layers else 0


Planner = Callable[[Problem, Call], Callable[..., Any]]


def table_of(op: str, triton: Planner, compiled: Planner, stock: Planner) -> Table:
    """The table of one of the ops, by what plans each implementation."""
    return Table(
        op,
        Implementation("triton", _why_not_triton, triton, "triton on cuda", "cuda"),
        Implementation("native", _why_not_native, compiled, "native on cpu", "cpu"),
        reference(stock),
    )


def _why_not_triton(problem: Problem, call: Call) -> str:
    x = call.x
    if x.dtype not in TRITON_DTYPES:
        return f"Triton computes in float16, bfloat16 and float32, got {x.dtype}"
    pixels = x.shape[2:].numel()
    if pixels > LARGEST_MAP:
        return f"Triton counts pixels in 32 bits, got {pixels}"
    # A compiled graph asks when it runs; tracing cannot.
    return "" if torch.compiler.is_compiling() else backends.lacks_triton(call.device)


def _why_not_native(problem: Problem, call: Call) -> str:
    if call.grad:
        return f"a gradient is needed, and the native {problem.op} has none"
    dtype = call.x.dtype
    if call.device != "cpu":
        return f"the native implementation needs CPU tensors, got {call.device}"
    if dtype not in DTYPES[:3]:
        return f"the native implementation computes in float32, float16 and bfloat16, got {dtype}"
    if not extension.has("cpu"):
        return extension.status()["cpu"].reason
    if call.automatic and torch.compiler.is_compiling():
        return "torch.compile generates the op on CPU"
    return ""


def copies(problem: Problem, x: Tensor) -> int:
    """How many maps are copied around the kernels, each of x's size."""
    nhwc, residual, out = layout.is_nhwc(x), problem.residual, problem.out
    around = sum(t is not None and not layout.fits(t, nhwc) for t in (x, residual))
    return around + (out is not None and bool(around or not layout.fits(out, nhwc)))


def checked_call(
    problem: Problem, x: Tensor, tensors: tuple, table: Table, backend: str, once: bool
) -> Call:
    """The call on x of ``tensors`` beside x and residual; checks residual and out."""
    op, residual, out = problem.op, problem.residual, problem.out
    if residual is not None:
        check_residual(op, residual, x)
    call = call_of(x, (x, residual, *tensors), table, backend, once)
    if out is None:
        return call
    check_out(op, out, x, x.shape, "x's shape,")
    check_not_differentiable(op, out, call.grad)
    return call


def check_map(op: str, x: Tensor) -> None:
    check_tensors(op, x=x)
    if x.dim() != 4:
        raise ValueError(
            f"{op}: x must have shape [N, C, H, W], got {list(x.shape)}; "
            f"give a single image a batch of one with x[None]"
        )
    if x.dtype not in DTYPES:
        raise TypeError(
            f"{op}: x must be float32, float16, bfloat16 or float64, got {x.dtype}; "
            f"convert it with .to(torch.float32)"
        )
    _, C, H, W = x.shape
    if C == 0 or H == 0 or W == 0:
        raise ValueError(
            f"{op}: x must have channels and pixels, got {list(x.shape)}: "
            f"the mean of no pixel is not defined"
        )


def check_gate(op: str, gate: Tensor, x: Tensor) -> None:
    check_tensors(op, gate=gate)
    if gate.shape != x.shape[:2]:
        raise ValueError(
            f"{op}: gate must have shape [N, C] = {list(x.shape[:2])} to match x "
            f"{list(x.shape)}, got {list(gate.shape)}; squeeze the trailing 1x1 of a conv gate "
            f"with gate.flatten(1)"
        )
    if gate.dtype != x.dtype and (gate.dtype != torch.float32 or x.dtype == torch.float64):
        raise TypeError(
            f"{op}: gate must have x's dtype, {x.dtype}, or float32, got {gate.dtype}; "
            f"convert it with .to(x.dtype)"
        )
    _check_device(op, "gate", gate, x)


def check_layers(
    op: str, layers: Layers, C: int, like: Tensor, dtypes: tuple[torch.dtype, ...],
    outputs: str = "C",
) -> None:  # fmt: skip
    """The two layers from C channels to R and back, or where ``outputs`` is "K" to as many as there
    are rows of weight2; on like's device, all in one of ``dtypes``."""
    weight1, bias1, weight2, bias2 = layers
    check_tensors(op, {"bias1": bias1, "bias2": bias2}, weight1=weight1, weight2=weight2)
    for name, weight in (("weight1", weight1), ("weight2", weight2)):
        if weight.dim() not in (2, 4) or weight.shape[2:].numel() != 1:
            raise ValueError(
                f"{op}: {name} must be a matrix or the weight of a 1x1 convolution, "
                f"got shape {list(weight.shape)}"
            )
    R, K = weight1.shape[0], C if outputs == "C" else weight2.shape[0]
    for name, tensor, shape, letters in (
        ("weight1", weight1, (R, C), "[R, C]"),
        ("bias1", bias1, (R,), "[R]"),
        ("weight2", weight2, (K, R), f"[{outputs}, R]"),
        ("bias2", bias2, (K,), f"[{outputs}]"),
    ):
        if tensor is None:
            continue
        if tuple(tensor.shape[:2]) != shape or 0 in (R, K):
            raise ValueError(
                f"{op}: {name} must have shape {letters} = {list(shape)} with R > 0 and "
                f"C = {C} as {_first(like)} has, got {list(tensor.shape)}"
            )
        if tensor.dtype != weight1.dtype:
            raise TypeError(
                f"{op}: {name} must have weight1's dtype, {weight1.dtype}, got {tensor.dtype}"
            )
        _check_device(op, name, tensor, like)
    if weight1.dtype not in dtypes:
        raise TypeError(
            f"{op}: weights and biases must be {' or '.join(map(str, dtypes))}, "
            f"got {weight1.dtype}; convert them with .to()"
        )


def parameter_dtypes(dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    """What weights may be beside maps of ``dtype``: the same, or float32 for the half dtypes."""
    return (dtype,) if dtype.itemsize >= 4 else (dtype, torch.float32)


def check_pooled(op: str, pooled: Tensor, count: int | None) -> None:
    check_tensors(op, pooled=pooled)
    if pooled.dim() != 2 or pooled.shape[1] == 0:
        raise ValueError(
            f"{op}: pooled must have shape [N, C], got {list(pooled.shape)}; "
            f"flatten a pooled map of 1x1 pixels with pooled.flatten(1)"
        )
    if pooled.dtype not in DTYPES:
        raise TypeError(
            f"{op}: pooled must be float32, float16, bfloat16 or float64, got {pooled.dtype}"
        )
    if count is None:
        return
    if count < 1:
        raise ValueError(f"{op}: count must be a positive number of pixels, got {count!r}")
    if pooled.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"{op}: with count=, pooled holds sums and must be float32 or float64, got "
            f"{pooled.dtype}: the sum of a map does not fit a half dtype"
        )


def _first(like: Tensor) -> str:
    """The name of an op's first argument."""
    return "x" if like.dim() == 4 else "pooled"


def _check_device(op: str, name: str, tensor: Tensor, like: Tensor) -> None:
    if tensor.device != like.device:
        raise ValueError(
            f"{op}: {name} must be on {_first(like)}'s device, {like.device}, got {tensor.device}; "
            f"move it with .to()"
        )
