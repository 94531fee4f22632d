"""What a step costs: kernels, and the bytes that each must move."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torch import Tensor

from cvkernels.freeze.graph import Like, Node
from cvkernels.ops.common.traffic import Traffic, touched_positions

if TYPE_CHECKING:
    from cvkernels.freeze.plan import Plan

# Steps that call a public op, which reports to ``explain`` itself, and those whose aten ops do.
REPORTS = ("cvkernels", "conv_bn_act")


def cost(plan: Plan, step: Node, reports: bool = True) -> Traffic | None:
    """The step's kernels and bytes; None for one that reports them itself, where that counts."""
    backend = step.attrs.get("backend")
    if reports and (backend in REPORTS or step.op in ("call", "copy") and backend != "native"):
        return None
    values = plan.lowered.values
    out = _nbytes(values[step])
    if step.op == "part":
        return Traffic(0, 0, 0)
    if step.op == "flatten":
        x = values[step.inputs[0]]
        moves = math.prod(x.shape[2:]) > 1
        return Traffic(int(moves), out * moves, out * moves)
    if step.op == "conv":
        return _conv(plan, step, out)
    if step.op == "conv_pool":
        problem, images = step.attrs["problem"], values[step].shape[0]
        between = problem.bytes_written
        read = images * (problem.bytes_read + between)
        return Traffic(2 * images, read, images * between + out)
    if step.op == "depthwise":
        problem = step.attrs["problem"]
        return Traffic(1, problem.bytes_read, problem.bytes_written)
    parameters = sum(t.nbytes for t in step.attrs.values() if isinstance(t, Tensor))
    parameters += sum(t.nbytes for t in step.attrs.get("input_affine") or ())
    read = sum(_nbytes(values[source]) for source in step.inputs)
    if step.op in ("max_pool", "avg_pool"):
        x, y = values[step.inputs[0]], values[step]
        axes = zip(x.shape[2:], *step.attrs["window"][:4], y.shape[2:], strict=True)
        touched = math.prod(touched_positions(*axis) for axis in axes)
        read = x.shape[0] * x.shape[1] * touched * x.dtype.itemsize
    return Traffic(1, read + parameters, out)


def _conv(plan: Plan, step: Node, out: int) -> Traffic:
    problem = step.attrs["problem"]
    kernels, extra = 1, 0
    if plan.memory.in_arena(step) and not plan.lowered.writes(step):
        kernels, extra = kernels + 1, extra + out
    if step.attrs["backend"] == "onednn" and plan.memory.slices(step.role("x")):
        # A slice is made contiguous first.
        kernels, extra = kernels + 1, extra + plan.lowered.values[step.role("x")].nbytes
    return Traffic(kernels, problem.bytes_read + extra, problem.bytes_written + extra)


def _nbytes(value: object) -> int:
    return value.nbytes if isinstance(value, Like) else 0
