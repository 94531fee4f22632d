"""excite: the two layers between the squeeze and the gate."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cvkernels import backend as backends
from cvkernels.backend import Backend
from cvkernels.ops.common.arguments import check_act, integer
from cvkernels.ops.common.dispatch import Call, call_of
from cvkernels.ops.common.norm import accumulator
from cvkernels.ops.common.plan import Plan, PlanTable, plan_of, planned_by
from cvkernels.ops.common.registration import register
from cvkernels.ops.common.traffic import Traffic, nbytes
from cvkernels.ops.common.work import GPU, Work
from cvkernels.ops.squeeze_excite import native, tiles, work
from cvkernels.ops.squeeze_excite.problem import (
    ACTS,
    DTYPES,
    Layers,
    Problem,
    check_layers,
    check_pooled,
    parameter_dtypes,
    table_of,
)
from cvkernels.ops.squeeze_excite.reference import excite_backward, excite_reference

OP = "excite"
_plans = PlanTable()

library = torch.library.Library("cvkernels", "FRAGMENT")
library.define(
    "excite(Tensor pooled, Tensor weight1, Tensor? bias1, Tensor weight2, Tensor? bias2, str act, "
    "bool sigmoid, int count, str backend) -> Tensor"
)


def plan(
    pooled_like: Tensor,
    weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None,
    act: str = "relu", *, sigmoid: bool = False, count: int | None = None,
    backend: Backend = "auto", once: bool = False,
) -> Plan:  # fmt: skip
    """A call of :func:`excite`, as ``plan(pooled)``; ``pooled_like`` is an example."""
    layers = (weight1, bias1, weight2, bias2)
    problem = _problem_of(layers, act, sigmoid, count)
    call = _checked(problem, pooled_like, backend, once)
    dense = layers if call.grad else native.matrices(*layers)
    planned = _plan(problem._replace(layers=dense), call).bind(dense)
    return planned.expecting(call, layers, pooled=pooled_like)


@planned_by(plan)
def excite(
    pooled: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor,
    bias2: Tensor | None, act: str = "relu", *,
    sigmoid: bool = False, count: int | None = None, backend: Backend = "auto",
) -> Tensor:  # fmt: skip
    """The gate's logits: ``out = act(mean @ weight1.T + bias1) @ weight2.T + bias2``.

    ``mean`` is ``pooled``, or ``pooled / count`` where ``count`` is given.

    Args:
        pooled: Tensor[N, C] of means, float32, float16, bfloat16 or float64; with ``count``, of
            sums over that many pixels, in float32 (or float64, with weights in float64).
        weight1: Tensor[R, C], or the weight [R, C, 1, 1] of a 1x1 convolution; pooled's dtype, or
            float32 beside a half dtype; with ``count`` any of the four. All parameters have one
            dtype.
        bias1: Tensor[R].
        weight2: Tensor[K, R] or [K, R, 1, 1]; K is C but where the gates are of another map.
        bias2: Tensor[K].
        act: "relu" or "silu".
        sigmoid: returns the multiplier ``sigmoid(out)``, as ``conv_bn_act(input_gate=)`` takes it.
        count: pixels of the map that pooled sums over.
        backend: see :mod:`cvkernels.backend`; the rule is that of :func:`se_scale`. Triton has one
            launch where weight1 and the means of 16 images are at most 96 KiB and R is at most 64,
            else two.

    Returns:
        Tensor[N, K], contiguous, never a view: dtype of pooled; of weight1, with ``count``. The
        fused backends compute in float32; Triton's products take means and hidden layer as sums
        of two numbers of the weights' dtype, where that is a half. NaN and infinity propagate.
        N = 0 gives an empty output.

    Raises:
        ValueError: a shape, device, act or count does not fit.
        TypeError: a dtype is not listed above, the parameters differ in theirs, or count is no
            integer.
        BackendError: the requested backend cannot run this call.

    Differentiable in pooled and every parameter. Equal inputs give equal bits. Source: Hu et al.
    2018, arXiv:1709.01507, eq. 3.
    """
    layers = (weight1, bias1, weight2, bias2)
    if torch.compiler.is_compiling():
        problem = _problem_of(layers, act, sigmoid, count)
        return _plan(problem, _checked(problem, pooled, backend, once=True)).run(layers, pooled)
    key = _plans.key(backend, (pooled, *layers), act, sigmoid, count, type(count))  # type: ignore[arg-type]
    if (planned := _plans.get(key)) is None:
        problem = _problem_of(layers, act, sigmoid, count)
        planned = _plan(problem, _checked(problem, pooled, backend, once=key is None))
        _plans.keep(key, planned, pooled, *layers)
    return planned.recorded(layers, pooled)


backends.answers(OP, plan)


def _problem_of(layers: Layers, act: str, sigmoid: bool, count: int | None) -> Problem:
    pixels = count if count is None else integer(OP, "count", count)
    return Problem(OP, layers, act, sigmoid=bool(sigmoid), pixels=pixels)


def _checked(problem: Problem, pooled: Tensor, backend: Backend, once: bool) -> Call:
    layers, count = problem.layers, problem.pixels
    check_pooled(OP, pooled, count)
    check_act(OP, "act", problem.act, ACTS)
    dtypes = parameter_dtypes(pooled.dtype)
    if count is not None:
        dtypes = DTYPES[:3] if pooled.dtype == torch.float32 else (torch.float64,)
    check_layers(OP, layers, pooled.shape[1], pooled, dtypes, outputs="K")
    return call_of(pooled, (pooled, *layers), TABLE, backend, once)


def _dtype_of(problem: Problem, pooled: Tensor) -> torch.dtype:
    """The dtype of the result."""
    return pooled.dtype if problem.pixels is None else problem.layers[0].dtype


def _plan_triton(problem: Problem, call: Call) -> Callable[..., Tensor]:
    if call.computes_nothing:
        dtype = _dtype_of(problem, call.x)
        return lambda layers, pooled: pooled.new_empty(len(pooled), problem.K, dtype=dtype)
    # Imported here: Triton is needed by the first CUDA call, not by importing cvkernels.
    from cvkernels.ops.squeeze_excite import triton

    options = (problem.act, problem.sigmoid, problem.pixels)
    launch = triton.plan_excite(call.x, problem.layers[0], problem.K, *options)
    return lambda layers, pooled: launch(pooled, layers)


def _plan_reference(problem: Problem, call: Call) -> Callable[..., Tensor]:
    act, sigmoid, count = problem.act, problem.sigmoid, problem.pixels

    def run(layers: Layers, pooled: Tensor) -> Tensor:
        return excite_reference(pooled, *layers, act, sigmoid=sigmoid, count=count)

    return run


TABLE = table_of(OP, _plan_triton, native.plan_excite, _plan_reference)


def _plan(problem: Problem, call: Call) -> Plan:
    """The plan of a checked call, as (layers, pooled)."""
    options = (problem.act, problem.sigmoid, problem.pixels or 0)

    def traffic(name: str) -> Traffic:
        pooled, dtype = call.x, _dtype_of(problem, call.x)
        read = nbytes(pooled, *problem.layers)
        written = len(pooled) * problem.K * dtype.itemsize
        if name != "triton":
            return Traffic(1, read, written)
        (N, C), itemsize = pooled.shape, problem.layers[0].element_size()
        tile = tiles.excite(N, 1, C, problem.R, problem.K, itemsize, tiles.sms_of(pooled))
        hidden = 4 * tile.splits * N * problem.R
        return Traffic(tile.launches, read + hidden, written + hidden)

    def registered(name: str) -> Callable[..., Tensor]:
        return lambda layers, pooled: torch.ops.cvkernels.excite(pooled, *layers, *options, name)

    def describe(name: str, gpu: GPU) -> tuple[Work, ...]:
        if name != "triton":
            return ()
        return work.excite(call.x.shape[0], 1, problem, gpu)

    return plan_of(TABLE, problem, call, (), traffic, registered, work=describe)


def _excite(pooled, weight1, bias1, weight2, bias2, act, sigmoid, count, backend):
    layers = (weight1, bias1, weight2, bias2)
    problem = Problem(OP, layers, act, sigmoid=sigmoid, pixels=count or None)
    call = Call(pooled, backends.device_type(pooled), backend, once=True)
    return _plan(problem, call).run(layers, pooled)


def _context(ctx, inputs, output):
    *tensors, ctx.act, ctx.sigmoid, ctx.count, _ = inputs
    ctx.save_for_backward(*tensors, output if ctx.sigmoid else None)


def _backward(ctx, grad):
    pooled, weight1, bias1, weight2, bias2, out = ctx.saved_tensors
    layers = (weight1, bias1, weight2, bias2)
    dtype = accumulator(weight1.dtype)
    if ctx.sigmoid:
        out = out.to(dtype)
        grad = grad.to(dtype) * out * (1 - out)
    count = ctx.count or 1
    d_mean, *d_layers = excite_backward(grad, pooled.to(dtype) / count, *layers, ctx.act)
    return (d_mean / count).to(pooled.dtype), *d_layers, None, None, None, None


register(library, OP, _excite, native.fake_excite, _backward, _context)
