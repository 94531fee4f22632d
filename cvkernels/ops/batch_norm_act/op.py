"""batch_norm_act: the contract, the choice of a backend, and the call with its gradient."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cvkernels import backend as backends
from cvkernels.backend import Backend
from cvkernels.ops.batch_norm_act import passes
from cvkernels.ops.batch_norm_act.reference import batch_norm_act_reference
from cvkernels.ops.common import native
from cvkernels.ops.common.arguments import (
    check_act,
    check_number,
    check_residual,
    check_tensors,
    check_vector,
)
from cvkernels.ops.common.autograd import without_gradient
from cvkernels.ops.common.differentiable import needs_stock, stock_gradients
from cvkernels.ops.common.dispatch import Call, Implementation, Table, call_of, reference
from cvkernels.ops.common.layout import is_pixel_matrix
from cvkernels.ops.common.norm import BatchNormParams, accumulator, vectors_of
from cvkernels.ops.common.plan import Plan, PlanTable, plan_of, planned_by
from cvkernels.ops.common.recycled import new_map
from cvkernels.ops.common.traffic import Traffic, nbytes

OP = passes.OP
ACTS = tuple(passes.ACTS)
DTYPES = native.DTYPES["cpu"]
_plans = PlanTable()
run_kept, is_traced = native.keeps_calls(4), native.is_traced


class BatchNormAct(NamedTuple):
    """What :func:`batch_norm_act` returns."""

    out: Tensor
    mean: Tensor
    var: Tensor


def plan(
    x_like: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    act: str = "none",
    residual: Tensor | None = None,
    backend: Backend = "auto",
    once: bool = False,
) -> Plan:
    """A call of :func:`batch_norm_act`, as ``plan(x, weight, bias, residual)``, all of them like
    the examples here. ``once``: this call alone, for which nothing is prepared.
    """
    tensors = (x_like, weight, bias, residual)
    _check(x_like, weight, bias, eps, act, residual)
    call = call_of(x_like, tensors, TABLE, backend, once)
    moved = Traffic(1, nbytes(x_like, x_like, residual), nbytes(x_like))
    planned = plan_of(TABLE, None, call, (weight, bias, residual, eps, act), lambda _: moved)
    planned.op = f"{OP}_forward"
    return planned.expecting(call, x=x_like, weight=weight, bias=bias, residual=residual)


@planned_by(plan)
def batch_norm_act(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    act: str = "none",
    residual: Tensor | None = None,
    backend: Backend = "auto",
) -> BatchNormAct:
    """Batch norm in training, with its activation and the shortcut that ends at it:
    ``out = act((x - mean) / sqrt(var + eps) * weight + bias + residual)``, mean and var those of x.

    Args:
        x: Tensor[N, C, H, W], float32, float16, bfloat16 or float64; any strides,
            channels_last and channel slices of a channels_last tensor are fast.
        weight: Tensor[C], any floating dtype; None for ones.
        bias: Tensor[C], any floating dtype; None for zeros.
        eps: added to the variance.
        act: "none", "relu" or "silu".
        residual: Tensor[N, C, H, W] of x's dtype, added before act, which is then "none" or "relu".
        backend: see :mod:`cvkernels.backend`. "auto" runs the native passes on CPU and CUDA
            tensors; the reference runs where the compiled part is missing or has no code for the
            GPU, for float64 on CUDA, for x of other strides than those, for CPU tensors under
            torch.compile, and under a torch.func transform.

    Returns:
        ``(out, mean, var)``: out as x, channels_last where the native passes ran; mean and biased
        variance Tensor[C], float32 (float64 for float64), through which no gradient flows: what
        running statistics are made of. Statistics and arithmetic are in float32 (float64 for
        float64), rounded once. None is a view of x.

    Raises:
        ValueError: a shape or device does not fit, act is not known or does not go with residual,
            or a channel of x has fewer than two elements.
        TypeError: a dtype is not listed above, residual's is not x's, or eps is no number.
        BackendError: the requested backend cannot run this call.
        RuntimeError: from the native passes' gradient, where what they keep for it was written.

    Differentiable in x, weight, bias and residual, any number of times. For the gradient the native
    passes keep x and the vectors, and compute what is behind the norm again; of a ReLU behind a
    residual they keep the output. Under ``create_graph=True`` it is the reference's.
    Source: Ioffe and Szegedy 2015, arXiv:1502.03167; the shortcut He et al. 2016, arXiv:1512.03385.
    """
    if not is_traced():
        if (found := run_kept(x, weight, bias, residual, eps, act, backend)) is not None:
            return BatchNormAct(*found)
    tensors = (x, weight, bias, residual)
    key = None if torch.compiler.is_compiling() else _plans.key(backend, tensors, eps, act)
    if (planned := _plans.get(key)) is None:
        options: Any = {"eps": eps, "act": act, "residual": residual, "backend": backend}
        planned = _plans.keep(key, plan(x, weight, bias, once=key is None, **options), *tensors)
        native.keep_call(run_kept, planned, eps, act, backend)
    return planned.recorded(*tensors)


backends.answers(OP, plan)


def _check(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, act: str,
    residual: Tensor | None,
) -> None:  # fmt: skip
    check_tensors(OP, x=x)
    check_number(OP, "eps", eps)
    if x.dim() != 4 or x.numel() <= x.shape[1]:
        raise ValueError(
            f"batch_norm_act: x must have shape [N, C, H, W] with more than one element per "
            f"channel, got {list(x.shape)}; normalise a single pixel in eval"
        )
    if x.dtype not in DTYPES:
        raise TypeError(
            f"batch_norm_act: x must be float32, float16, bfloat16 or float64, got {x.dtype}"
        )
    check_act(OP, "act", act, ACTS)
    if residual is not None:
        if act == "silu":
            raise ValueError(
                "batch_norm_act: a residual goes with act 'none' or 'relu', got 'silu'"
            )
        check_residual("batch_norm_act", residual, x)
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is not None:
            check_vector("batch_norm_act", name, vector, x.shape[1], x)


def _why_not_native(problem: None, call: Call) -> str:
    if call.automatic and torch._C._functorch.peek_interpreter_stack() is not None:
        return "a torch.func transform is active"
    return passes.why_not_native(problem, call)


def _plan_reference(problem: None, call: Call, *like: Any) -> Callable[..., BatchNormAct]:
    eps, act = like[-2:]

    def run(x, weight=None, bias=None, residual=None):
        out, mean, var = batch_norm_act_reference(x, weight, bias, eps, act, residual)
        return BatchNormAct(out, mean.detach(), var.detach())

    return run


def _plan_native(problem: None, call: Call, *like: Any) -> Callable[..., BatchNormAct]:
    compute, (eps, act) = _plan_compute(call, *like), like[-2:]
    if call.grad:
        compute = functools.partial(_BatchNormAct.apply, compute, eps, act)

    def run(x, weight=None, bias=None, residual=None):
        out, vectors = compute(x, weight, bias, residual)
        return BatchNormAct(out, vectors[0], vectors[1])

    run.recipe = getattr(compute, "recipe", None)  # type: ignore[attr-defined]
    return run


TABLE = Table(
    OP,
    Implementation("native", _why_not_native, _plan_native, native.compiled_for),
    reference(_plan_reference),
)


def _plan_compute(
    call: Call,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    act: str,
) -> Callable[..., tuple[Tensor, Tensor]]:
    """(out, vectors) as a function of (x, weight, bias, residual)."""
    x, fits = call.x, residual is None or is_pixel_matrix(residual)

    def compute(x, weight, bias, residual):
        vectors = x.new_empty(4, x.shape[1], dtype=passes.wide_dtype(x))
        out = new_map(x)
        weight, bias = (t if t is None else t.detach() for t in (weight, bias))
        weight, bias = vectors_of(BatchNormParams(weight, bias), x)[:2]
        if residual is not None and not is_pixel_matrix(residual):
            residual = residual.contiguous(memory_format=torch.channels_last)
        passes.forward(x, weight, bias, None, eps, act, residual, vectors, out)
        return out, vectors

    kinds = (x.dtype, accumulator(x.dtype))
    read = all(t is None or t.is_contiguous() and t.dtype in kinds for t in (weight, bias))
    if not fits or not read or not native.directs(call):
        return compute
    out, vectors = compute(x.detach(), weight, bias, residual)
    operands = (x, weight, bias, residual)
    work = native.direct(
        lambda: passes.forward(x, weight, bias, None, eps, act, residual, vectors, out)
    )
    rows, like = native.template(vectors), native.template(out)
    fresh = torch.empty_like

    def compute_directly(x, weight, bias, residual):
        out, vectors = fresh(like), fresh(rows)
        work(
            x.data_ptr(), 0 if weight is None else weight.data_ptr(),
            0 if bias is None else bias.data_ptr(), 0, 0,
            0 if residual is None else residual.data_ptr(), vectors.data_ptr(), out.data_ptr(),
        )  # fmt: skip
        return out, vectors

    results = (out, vectors[0], vectors[1])
    recipe = native.recipe(work, operands, (out, vectors), results)
    compute_directly.recipe = recipe  # type: ignore[attr-defined]
    return compute_directly


class _BatchNormAct(torch.autograd.Function):
    """Saves x, the vectors, weight and bias, and out where it tells what a ReLU let pass."""

    @staticmethod
    def forward(ctx, compute, eps, act, x, weight, bias, residual):
        ctx.set_materialize_grads(False)
        out, vectors = compute(x, weight, bias, residual)
        of_output = residual is not None and act == "relu"
        ctx.save_for_backward(x, vectors, weight, bias, *((out,) if of_output else ()))
        ctx.mark_non_differentiable(vectors)
        ctx.eps, ctx.act = eps, act
        ctx.dtypes = [t if t is None else t.dtype for t in (weight, bias)]
        return out, vectors

    @staticmethod
    @without_gradient
    def backward(ctx, grad, _):
        if needs_stock(grad):
            return None, None, None, *_stock_gradients(ctx, grad)
        x, vectors, _, _, *output = ctx.saved_tensors
        _, _, _, needs_x, *needs_vectors, needs_residual = ctx.needs_input_grad
        out = new_map(x) if needs_x else None
        d_vectors, d_residual = norm_backward(grad, x, vectors, ctx.eps, ctx.act, out, *output)
        grads = (
            d.to(dtype) if need else None
            for d, dtype, need in zip(d_vectors, ctx.dtypes, needs_vectors, strict=False)
        )
        return None, None, None, out, *grads, d_residual if needs_residual else None


def _stock_gradients(ctx: Any, grad: Tensor) -> list[Tensor | None]:
    """Those in x, weight, bias and residual, by stock operations."""
    x, _, weight, bias, *output = ctx.saved_tensors
    *needs, needs_residual = ctx.needs_input_grad[3:]
    act = ctx.act
    if output:
        # What ReLU stopped in forward it stops here: the residual's values are not needed.
        act, grad = "none", grad.masked_fill(output[0].detach() <= 0, 0)

    def compute(x, weight, bias):
        return batch_norm_act_reference(x, weight, bias, ctx.eps, act)[:1]

    found = stock_gradients(compute, (x, weight, bias), needs, (grad,))
    return [*found, grad if needs_residual else None]


def norm_backward(
    grad: Tensor,
    x: Tensor,
    vectors: Tensor,
    eps: float,
    act: str,
    out: Tensor | None,
    output: Tensor | None = None,
    may_overwrite: bool = False,
    join: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of ``act(batch_norm(x) + residual)``: as :func:`passes.backward`, and the
    residual's. ``output`` is the result, which "relu" behind a residual needs; where
    ``may_overwrite``, the residual's gradient is written over it. ``join`` makes of slope and
    offset those of a batch that other processes have parts of, in place.
    """
    grad = grad.to(x.dtype)
    if not is_pixel_matrix(grad):
        grad = grad.contiguous(memory_format=torch.channels_last)
    of_output = None
    if output is not None:
        output = output.contiguous(memory_format=torch.channels_last)
        of_output = (output, output if may_overwrite else new_map(output))
    dy = grad if of_output is None else of_output[1]
    if join is None:
        return passes.backward(grad, x, vectors, eps, act, of_output, out), dy
    results = passes.backward(grad, x, vectors, eps, act, of_output, None)
    if out is not None:
        join(results[2:])
        passes.finish(dy, x, vectors, eps, act if of_output is None else "none", results, out)
    return results, dy
