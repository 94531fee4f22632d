"""squeeze_excite: squeeze, excite and scale as one call."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cvkernels import backend as backends
from cvkernels.backend import Backend
from cvkernels.ops.common.arguments import check_act, check_overlap
from cvkernels.ops.common.dispatch import Call, choose
from cvkernels.ops.common.layout import format_of, in_format, is_nhwc, new_like
from cvkernels.ops.common.norm import accumulator
from cvkernels.ops.common.plan import Plan, PlanTable, plan_of, planned_by
from cvkernels.ops.common.registration import register
from cvkernels.ops.common.traffic import Traffic, nbytes
from cvkernels.ops.common.work import GPU, Work
from cvkernels.ops.squeeze_excite import native, tiles, work
from cvkernels.ops.squeeze_excite.problem import (
    ACTS,
    IN_PLACE,
    OUT_ACTS,
    Layers,
    Problem,
    check_layers,
    check_map,
    checked_call,
    copies,
    parameter_dtypes,
    table_of,
)
from cvkernels.ops.squeeze_excite.reference import (
    excite_reference,
    se_scale_reference,
    squeeze_excite_backward,
    squeeze_excite_reference,
)
from cvkernels.ops.squeeze_excite.scale import saved_for_act

OP = "squeeze_excite"
_plans = PlanTable()

library = torch.library.Library("cvkernels", "FRAGMENT")
library.define(
    "squeeze_excite(Tensor x, Tensor weight1, Tensor? bias1, Tensor weight2, Tensor? bias2, "
    "str act, Tensor? residual, str out_act, str backend) -> (Tensor, Tensor, Tensor)"
)


def plan(
    x_like: Tensor,
    weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None,
    act: str = "relu", residual: Tensor | None = None, out_act: str = "none", *,
    out: Tensor | None = None, backend: Backend = "auto", once: bool = False,
) -> Plan:  # fmt: skip
    """A call of :func:`squeeze_excite`, as ``plan(x, residual=None, out=None)``.

    ``x_like``, ``residual`` and ``out`` are examples.
    """
    layers = (weight1, bias1, weight2, bias2)
    problem = Problem(OP, layers, act, None, residual, out_act, out)
    call = _checked(problem, x_like, backend, once)
    dense = layers if call.grad else native.matrices(*layers)
    planned = _plan(problem._replace(layers=dense), call).bind(dense)
    return planned.expecting(call, layers, x=x_like, residual=residual, out=out)


@planned_by(plan)
def squeeze_excite(
    x: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None,
    act: str = "relu", residual: Tensor | None = None, out_act: str = "none", *,
    out: Tensor | None = None, backend: Backend = "auto",
) -> Tensor:  # fmt: skip
    """The whole block: ``out = out_act(x * sigmoid(logits)[:, :, None, None] + residual)``.

    ``logits = excite(squeeze(x), weight1, bias1, weight2, bias2, act)``. On CUDA three launches,
    or four where :func:`excite` takes two. On CPU one pass per image, or per few small ones, while
    they are in the cache; outputs of 8 MB and more are written past it.

    Args:
        x: Tensor[N, C, H, W], float32, float16, bfloat16 or float64; contiguous, channels_last and
            channel slices of a channels_last buffer are fast, other strides are copied first.
        weight1: Tensor[R, C], or the weight [R, C, 1, 1] of a 1x1 convolution; dtype of x, or
            float32 beside a half dtype. All parameters have one dtype.
        bias1: Tensor[R].
        weight2: Tensor[C, R] or [C, R, 1, 1].
        bias2: Tensor[C].
        act: "relu" or "silu", between the layers.
        residual: Tensor[N, C, H, W], dtype of x, added before out_act; fast in x's layout.
        out_act: "none", "relu" or "silu".
        out: as of :func:`se_scale`; it may be x itself.
        backend: see :mod:`cvkernels.backend`; the rule is that of :func:`se_scale`.

    Returns:
        Tensor[N, C, H, W], as :func:`se_scale`. The fused backends keep means and logits in
        float32.

    Raises:
        ValueError: a shape, device or activation does not fit, x has no channels or no pixels, out
            overlaps an argument in part or itself, or a gradient is needed with out.
        TypeError: dtype not listed above, or dtypes differ.
        BackendError: the requested backend cannot run this call.

    Differentiable in x, residual and every parameter, any number of times. Equal
    inputs give equal bits. Source: Hu et al. 2018, arXiv:1709.01507, figures 2 and 3.
    """
    layers = (weight1, bias1, weight2, bias2)
    if torch.compiler.is_compiling():
        problem = Problem(OP, layers, act, None, residual, out_act, out)
        y = _plan(problem, _checked(problem, x, backend, once=True)).run(layers, x, residual)
        return y if out is None else out.copy_(y)
    key = _plans.key(backend, (x, *layers, residual, out), act, out_act)
    if (planned := _plans.get(key)) is None:
        problem = Problem(OP, layers, act, None, residual, out_act, out)
        planned = _plan(problem, _checked(problem, x, backend, once=key is None))
        _plans.keep(key, planned, x, *layers, residual, out)
    if out is not None:
        names = ("weight1", "bias1", "weight2", "bias2")
        inputs = {"x": x, "residual": residual, **dict(zip(names, layers, strict=True))}
        check_overlap(OP, out, inputs, IN_PLACE)
    return planned.recorded(layers, x, residual, out)


backends.answers(OP, plan)


def squeeze_excite_kept(
    x: Tensor, layers: Layers, act: str, residual: Tensor | None, out_act: str
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`squeeze_excite` with the means and the logits; autograd does not see it."""
    with torch.no_grad():
        planned = plan(x, *layers, act, residual, out_act, once=True)

        def run():
            op = torch.ops.cvkernels.squeeze_excite
            return op(x, *layers, act, residual, out_act, planned.backend)

        return Plan(OP, planned.backend, planned.reason, run, lambda: planned.traffic)()


def _checked(problem: Problem, x: Tensor, backend: Backend, once: bool) -> Call:
    layers = problem.layers
    check_map(OP, x)
    check_act(OP, "act", problem.act, ACTS)
    check_act(OP, "out_act", problem.out_act, OUT_ACTS)
    check_layers(OP, layers, x.shape[1], x, parameter_dtypes(x.dtype))
    return checked_call(problem, x, layers, TABLE, backend, once)


def _plan_triton(problem: Problem, call: Call) -> Callable[..., Tensor]:
    if call.computes_nothing:
        return lambda layers, x, residual=None, out=None: new_like(x) if out is None else out
    fitted = not copies(problem, call.x)
    launch = _triton(problem if fitted else problem._replace(out=None), call.x, False)

    def run(layers, x, residual=None, out=None):
        return launch(x, layers, residual, out)[0]

    return native.writing(run, fitted)


def _triton(
    problem: Problem, x: Tensor, keep_mean: bool
) -> Callable[..., tuple[Tensor, Tensor | None, Tensor]]:
    """(x, layers, residual, out) -> (out, the means where they are kept, the logits)."""
    # Imported here: Triton is needed by the first CUDA call, not by importing cvkernels.
    from cvkernels.ops.squeeze_excite import triton

    options = (problem.layers[0], problem.act, problem.residual, problem.out_act, problem.out)
    return triton.plan_squeeze_excite(x, *options, keep_mean)


def _plan_reference(problem: Problem, call: Call) -> Callable[..., Tensor]:
    act, out_act = problem.act, problem.out_act

    def run(
        layers: Layers, x: Tensor, residual: Tensor | None = None, out: Tensor | None = None
    ) -> Tensor:
        y = squeeze_excite_reference(x, *layers, act, residual, out_act)
        return y if out is None else out.copy_(y)

    return run


TABLE = table_of(OP, _plan_triton, native.plan_squeeze_excite, _plan_reference)


def _plan(problem: Problem, call: Call) -> Plan:
    """The plan of a checked call, as (layers, x, residual, out)."""
    act, out_act = problem.act, problem.out_act

    def traffic(name: str) -> Traffic:
        x, others = call.x, nbytes(problem.residual, *problem.layers)
        copied, size = copies(problem, x), nbytes(x)
        moved = size * copied
        if name != "triton":
            return Traffic(1 + copied, size + others + moved, size + moved)
        (N, C), parts = x.shape[:2], tiles.parts_of(x, sms := tiles.sms_of(x))
        itemsize = problem.layers[0].element_size()
        layers = tiles.excite(N, parts, C, problem.R, C, itemsize, sms)
        moved += 4 * N * (C * (parts + 1) + layers.splits * problem.R)
        return Traffic(2 + layers.launches + copied, 2 * size + others + moved, size + moved)

    def registered(name: str) -> Callable[..., Tensor]:
        def run(layers, x, residual=None, out=None):
            op = torch.ops.cvkernels.squeeze_excite
            return op(x, *layers, act, residual, out_act, name)[0]

        return run

    def describe(name: str, gpu: GPU) -> tuple[Work, ...]:
        return work.squeeze_excite(problem, call.x, gpu) if name == "triton" else ()

    return plan_of(TABLE, problem, call, (), traffic, registered, work=describe)


def _squeeze_excite(x, weight1, bias1, weight2, bias2, act, residual, out_act, backend):
    layers = (weight1, bias1, weight2, bias2)
    problem = Problem(OP, layers, act, None, residual, out_act)
    call = Call(x, backends.device_type(x), backend, once=True)
    name = choose(TABLE, problem, call)[1].backend
    if name == "triton":
        out, mean, gate = _triton(problem, x, True)(x, layers, residual)
    elif name == "native" and x.dtype == torch.float32:
        mean = native.plan_squeeze(problem, call)(x)
        gate = native.plan_excite(problem, call)(layers, mean)
        out = native.plan_se_scale(problem, call)(x, gate, residual)
    else:
        mean = x.mean((2, 3), dtype=accumulator(x.dtype))
        gate = excite_reference(mean, *layers, act)
        out = se_scale_reference(x, gate, residual, out_act)
    return in_format(out, format_of(is_nhwc(x))), mean, gate


def _fake(x, *_):
    gate = x.new_empty(x.shape[:2], dtype=accumulator(x.dtype))
    return new_like(x), gate, torch.empty_like(gate)


def _context(ctx, inputs, output):
    x, *layers, ctx.act, residual, ctx.out_act, ctx.backend = inputs
    out, mean, gate = output
    ctx.save_for_backward(x, *layers, mean, gate, *saved_for_act(ctx.out_act, residual, out))
    ctx.mark_non_differentiable(mean, gate)
    ctx.has_residual = residual is not None


def _backward(ctx, grad, *_):
    x, *layers, mean, gate, residual, out = ctx.saved_tensors
    dx, d_layers, dz = squeeze_excite_backward(
        grad, x, layers, mean, gate, residual, out, ctx.act, ctx.out_act,
        ctx.needs_input_grad[0], ctx.backend,
    )  # fmt: skip
    return dx, *d_layers, None, dz if ctx.has_residual else None, None, None


register(library, OP, _squeeze_excite, _fake, _backward, _context)
