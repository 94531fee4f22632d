"""The passes of batch norm in training, as functions of tensors that write where they are told.

With n pixels and, per channel, ``scale = weight / sqrt(var + eps)``:

    z = (x - mean) * scale + bias              y = act(z)              dy = grad * act'(z)
    d_bias = sum dy                            d_weight = sum dy * (x - mean) / sqrt(var + eps)
    dx = dy * scale + (x - mean) * slope + offset
    slope = -scale / sqrt(var + eps) * d_weight / n        offset = -scale * d_bias / n

``act`` is "none", "relu" or "silu". Where a shortcut ends, ``y = act(z + residual)`` with "none" or
"relu", ``dy = grad where y > 0, else 0`` is the residual's gradient too.

:func:`forward`, :func:`recompute`, :func:`backward` and :func:`finish` are of one norm and its
vectors [4, C]: mean, var, weight and bias in the dtype that x is computed in, which forward fills.

Several norms of one x share its mean and var, and the last two terms of dx are linear in what is
summed: after :func:`statistics` and each norm's :func:`apply`, :func:`reduce` adds ``dy * scale``,
slope and offset to what other norms left, and one :func:`input_gradient` finishes the sum.

A map is Tensor[N, C, H, W], channels_last or a channel slice of such a tensor where the native op
is to run; vectors are float32 (float64 for float64 maps), but for weight and bias, of any floating
dtype. Nothing is checked here beyond what the native op checks, and nothing is differentiable.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cvkernels import backend as backends
from cvkernels import record
from cvkernels.ops.batch_norm_act import reference as stock
from cvkernels.ops.common import native, norm
from cvkernels.ops.common.dispatch import Call, Implementation, Table, call_of, reference
from cvkernels.ops.common.layout import is_pixel_matrix
from cvkernels.ops.common.norm import BatchNormParams
from cvkernels.ops.common.plan import plan_of
from cvkernels.ops.common.traffic import Traffic, nbytes

OP = "batch_norm_act"
_NORM = "Tensor? weight, Tensor? bias, Tensor mean, Tensor var, float eps, int act"

library = torch.library.Library("cvkernels", "FRAGMENT")
for _schema in (
    "statistics(Tensor x, Tensor(a!) mean, Tensor(b!) var)",
    f"apply(Tensor x, {_NORM}, Tensor(a!) out)",
    f"reduce(Tensor grad, Tensor x, {_NORM}, Tensor(a!) total, Tensor(b!) d_weight, "
    "Tensor(c!) d_bias, Tensor(d!) slope, Tensor(e!) offset)",
    "input_gradient(Tensor grad, Tensor x, Tensor mean, Tensor slope, Tensor offset, "
    "Tensor(a!) out)",
    "forward(Tensor x, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, "
    "Tensor(b!)? running_var, float factor, float eps, int act, Tensor? residual, "
    "Tensor(c!) vectors, Tensor(d!) out)",
    "recompute(Tensor x, Tensor vectors, float eps, int act, Tensor? residual, Tensor(a!) out)",
    "backward(Tensor grad, Tensor x, Tensor vectors, float eps, int act, Tensor? output, "
    "Tensor(a!)? grad_residual, Tensor(b!) results, Tensor(c!)? out)",
    "finish(Tensor grad, Tensor x, Tensor vectors, float eps, int act, Tensor results, "
    "Tensor(a!) out)",
):
    library.define(f"{OP}_{_schema} -> ()")
    native.writes(library, f"{OP}_{_schema.partition('(')[0]}")
_ops = torch.ops.cvkernels
# As csrc/common/act.h counts them.
ACTS = {"none": 0, "relu": 1, "silu": 3}


class Running(NamedTuple):
    """Running statistics, of x's dtype or the one that it is computed in, and how far they move."""

    mean: Tensor
    var: Tensor
    factor: float


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running: Running | None,
    eps: float,
    act: str,
    residual: Tensor | None,
    vectors: Tensor,
    out: Tensor,
) -> Tensor:
    """Fill vectors, move the running statistics, write ``act(z + residual)`` to out; returns out.

    out and residual have x's shape and dtype; out may be either's elements. Absent weights are
    ones, absent biases zeros. ``running = running * (1 - factor) + batch's * factor``, with the
    unbiased variance.
    """
    running_mean, running_var, factor = running or (None, None, 0.0)

    def run() -> None:
        _ops.batch_norm_act_forward.default(
            x, weight, bias, running_mean, running_var, factor, eps, ACTS[act], residual, vectors,
            out,
        )  # fmt: skip

    def as_reference() -> None:
        rows = stock.rows_of(*stock.statistics_reference(x), weight, bias)
        for row, value in zip(vectors, rows, strict=True):
            row.copy_(value)
        pixels = x.numel() // x.shape[1]
        news = (rows[0], rows[1] * (pixels / (pixels - 1)))
        for old, new in zip((running_mean, running_var), news, strict=True):
            if old is not None:
                old.copy_(torch.lerp(old.to(new.dtype), new, factor))
        out.copy_(stock.apply_reference(x, params_of(vectors, eps), act, residual))

    read = (x, x) if residual is None else (x, x, residual)
    _run("forward", x, read, (out,), run, as_reference)
    if running and not torch.compiler.is_compiling() and not running.mean.is_inference():
        # Weights that were derived from them are stale.
        torch.autograd.graph.increment_version((running.mean, running.var))
    return out


def recompute(
    x: Tensor, vectors: Tensor, eps: float, act: str, residual: Tensor | None, out: Tensor
) -> Tensor:
    """Write ``act(z + residual)`` to out as :func:`forward` did; returns it."""

    def run() -> None:
        _ops.batch_norm_act_recompute.default(x, vectors, eps, ACTS[act], residual, out)

    def as_reference() -> None:
        out.copy_(stock.apply_reference(x, params_of(vectors, eps), act, residual))

    read = (x,) if residual is None else (x, residual)
    _run("recompute", x, read, (out,), run, as_reference)
    return out


def backward(
    grad: Tensor,
    x: Tensor,
    vectors: Tensor,
    eps: float,
    act: str,
    of_output: tuple[Tensor, Tensor] | None,
    out: Tensor | None,
) -> Tensor:
    """Write dx to out where that is given; returns d_weight, d_bias, slope and offset as [4, C].

    ``of_output`` is, for "relu" behind a residual, what :func:`forward` gave and the map that dy
    is written to, the residual's gradient, both as x; they may be one.
    """
    output, grad_residual = of_output or (None, None)
    results = x.new_empty(4, x.shape[1], dtype=wide_dtype(x))
    if not x.numel():
        return results.zero_()

    def run() -> None:
        _ops.batch_norm_act_backward.default(
            grad, x, vectors, eps, ACTS[act], output, grad_residual, results, out
        )

    def as_reference() -> None:
        bn = params_of(vectors, eps)
        dy, _, *values = stock.reduce_reference(grad, x, bn, act, output)
        for row, value in zip(results, values, strict=True):
            row.copy_(value)
        if grad_residual is not None:
            grad_residual.copy_(dy)
        if out is not None:
            out.copy_(stock.finish_reference(dy, x, bn, "none", *results[2:]))

    read = [t for t in (grad, x, output, *((x, grad) if out is not None else ())) if t is not None]
    written = [t for t in (grad_residual, out) if t is not None]
    _run("backward", x, read, written, run, as_reference)
    return results


def finish(
    grad: Tensor, x: Tensor, vectors: Tensor, eps: float, act: str, results: Tensor, out: Tensor
) -> None:
    """Write dx to out, from :func:`backward`'s results: where it got no out, since slope and offset
    were first to become those of several processes. grad is dy, and act "none", where that was
    written.
    """

    def run() -> None:
        _ops.batch_norm_act_finish.default(grad, x, vectors, eps, ACTS[act], results, out)

    def as_reference() -> None:
        out.copy_(stock.finish_reference(grad, x, params_of(vectors, eps), act, *results[2:]))

    _run("finish", x, (grad, x), (out,), run, as_reference)


def statistics(x: Tensor, out: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel, written to out where that is given."""
    mean, var = (vector_like(x), vector_like(x)) if out is None else out

    def run() -> None:
        _ops.batch_norm_act_statistics.default(x, mean, var)

    def as_reference() -> None:
        for vector, value in zip((mean, var), stock.statistics_reference(x), strict=True):
            vector.copy_(value)

    _run("statistics", x, (x,), (mean, var), run, as_reference)
    return mean, var


def apply(x: Tensor, bn: BatchNormParams, act: str, out: Tensor) -> Tensor:
    """Write ``act(z)`` to out, of x's shape and dtype; returns it."""
    vectors = norm.vectors_of(bn, x)

    def run() -> None:
        _ops.batch_norm_act_apply.default(x, *vectors, ACTS[act], out)

    def as_reference() -> None:
        out.copy_(stock.apply_reference(x, vectors, act))

    _run("apply", x, (x,), (out,), run, as_reference)
    return out


def reduce(
    grad: Tensor,
    x: Tensor,
    bn: BatchNormParams,
    act: str,
    sums: tuple[Tensor, Tensor],
    total: Tensor,
) -> tuple[Tensor, Tensor]:
    """(d_weight, d_bias); ``sums``, slope and offset, and the map total are added to.

    ``total`` has x's shape and the dtype that x is computed in. act is "none" or "relu".
    """
    vectors = norm.vectors_of(bn, x)
    if not x.numel():
        return vector_like(x, zero=True), vector_like(x, zero=True)
    results = (vector_like(x), vector_like(x), *sums)

    def run() -> None:
        _ops.batch_norm_act_reduce.default(grad, x, *vectors, ACTS[act], total, *results)

    def as_reference() -> None:
        _, scaled, *values = stock.reduce_reference(grad, x, vectors, act)
        for out, value in zip(results[:2], values[:2], strict=True):
            out.copy_(value)
        for out, value in zip(sums, values[2:], strict=True):
            out.add_(value)
        total.add_(scaled)

    _run("reduce", x, (grad, x, total), (total,), run, as_reference)
    return results[:2]


def input_gradient(
    total: Tensor, x: Tensor, mean: Tensor, slope: Tensor, offset: Tensor, out: Tensor
) -> Tensor:
    """Write ``total + (x - mean) * slope + offset`` to out, of x's shape and dtype; returns it.

    The total has x's dtype or the one that x is computed in.
    """

    def run() -> None:
        _ops.batch_norm_act_input_gradient.default(total, x, mean, slope, offset, out)

    def as_reference() -> None:
        through = stock.through_statistics_reference(x, mean, slope, offset)
        out.copy_(stock.wide(total) + through)

    _run("input_gradient", x, (total, x), (out,), run, as_reference)
    return out


def vectors_of(bn: BatchNormParams, x: Tensor) -> Tensor:
    """What :func:`forward` fills, of a norm of x whose statistics are there."""
    assert bn.mean is not None and bn.var is not None
    rows = stock.rows_of(bn.mean, bn.var, bn.weight, bn.bias)
    return torch.stack([row.to(wide_dtype(x)) for row in rows])


def params_of(vectors: Tensor, eps: float) -> BatchNormParams:
    mean, var, weight, bias = vectors.unbind()
    return BatchNormParams(weight, bias, mean, var, eps)


def vector_like(x: Tensor, zero: bool = False) -> Tensor:
    """A vector with an element for each of x's channels, of the dtype that x is computed in."""
    make = x.new_zeros if zero else x.new_empty
    return make(x.shape[1], dtype=wide_dtype(x))


def wide_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def why_not_native(_: object, call: Call) -> str:
    """Why the native passes cannot run on the call's x; empty where they can."""
    if not is_pixel_matrix(call.x):
        return "a map is no channel slice of a channels_last tensor"
    return native.lacks(OP, call)


# Of one pass: both ways to run it are there.
TABLE = Table(
    OP,
    Implementation("native", why_not_native, lambda _, call, run, __: run, native.compiled_for),
    reference(lambda _, call, __, as_reference: as_reference),
)


def _run(
    name: str,
    x: Tensor,
    read: Sequence,
    written: Sequence,
    run: Callable[[], None],
    as_reference: Callable[[], None],
) -> None:
    if _runs_native(x):
        return run()
    sizes = (nbytes(*group) for group in (read, written))
    call = call_of(x, (), TABLE, "auto", once=True)
    planned = plan_of(TABLE, None, call, (run, as_reference), lambda _: Traffic(1, *sizes))
    planned.op = OP if planned.backend == "reference" else f"{OP}_{name}"
    planned.recorded()


def _runs_native(x: Tensor) -> bool:
    """Whether "auto" gives native, and no running ``explain`` has to see the call."""
    return (
        not torch.compiler.is_compiling()
        and backends.in_force() == "auto"
        and record.current() is None
        and not native.why_not(OP, x, x.device.type)
        and is_pixel_matrix(x)
    )
