"""The passes of batch norm in training, as functions of tensors that write where they are told.

With n pixels and, per channel, ``scale = weight / sqrt(var + eps)``:

    z = (x - mean) * scale + bias              y = act(z)              dy = grad * act'(z)
    d_bias = sum dy                            d_weight = sum dy * (x - mean) / sqrt(var + eps)
    dx = dy * scale + (x - mean) * slope + offset
    slope = -scale / sqrt(var + eps) * d_weight / n        offset = -scale * d_bias / n

``act`` is "none", "relu" or "silu". Where a shortcut ends, ``y = act(z + residual)`` with "none" or
"relu", ``dy = grad where y > 0, else 0`` is the residual's gradient too.

Several norms of one x share its mean and var, and the last two terms of dx are linear in what is
summed: :func:`reduce` adds ``dy * scale``, slope and offset to what other norms left there, and one
:func:`input_gradient` finishes the sum.

A map is Tensor[N, C, H, W], channels_last or a channel slice of such a tensor where the native op
is to run; vectors are float32 (float64 for float64 maps), but for weight and bias, of any floating
dtype. Nothing is checked here beyond what the native op checks, and nothing is differentiable.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cvkernels import backend as backends
from cvkernels import record
from cvkernels.backend import Choice
from cvkernels.ops import affine, native
from cvkernels.ops.batch_norm import BatchNormParams
from cvkernels.ops.batch_norm_act import reference

_NORM = "Tensor? weight, Tensor? bias, Tensor mean, Tensor{} var, float eps, int act"
_VECTORS = "Tensor(b!) d_weight, Tensor(c!) d_bias, Tensor(d!) slope, Tensor(e!) offset"

library = torch.library.Library("cvkernels", "FRAGMENT")
library.define("batch_norm_act_statistics(Tensor x, Tensor(a!) mean, Tensor(b!) var) -> ()")
library.define(
    f"batch_norm_act_apply(Tensor x, {_NORM.format('')}, Tensor? residual, Tensor(a!) out) -> ()"
)
library.define(
    f"batch_norm_act_reduce(Tensor grad, Tensor x, {_NORM.format('')}, Tensor? joined, "
    f"Tensor(f!)? masked, Tensor(a!)? total, {_VECTORS}) -> ()"
)
library.define(
    f"batch_norm_act_input_gradient(Tensor grad, Tensor x, {_NORM.format('?')}, Tensor slope, "
    f"Tensor offset, Tensor(a!) out) -> ()"
)
_ops = torch.ops.cvkernels
# As csrc/act.h counts them.
ACTS = {"none": 0, "relu": 1, "silu": 3}


def statistics(x: Tensor, out: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel, written to out where that is given."""
    mean, var = (vector_like(x), vector_like(x)) if out is None else out

    def run() -> None:
        _ops.batch_norm_act_statistics.default(x, mean, var)

    def as_reference() -> None:
        for vector, value in zip((mean, var), reference.statistics_reference(x), strict=True):
            vector.copy_(value)

    _run("statistics", x, (x,), (mean, var), run, as_reference)
    return mean, var


def apply(
    x: Tensor, bn: BatchNormParams, act: str, out: Tensor, residual: Tensor | None = None
) -> Tensor:
    """Write ``act((x - mean) * scale + bias + residual)`` to out; returns it.

    out and residual have x's shape and dtype; out may be either's elements. A residual goes with
    "none" and "relu".
    """
    vectors = affine.vectors_of(bn, x)

    def run() -> None:
        _ops.batch_norm_act_apply.default(x, *vectors, ACTS[act], residual, out)

    def as_reference() -> None:
        out.copy_(reference.apply_reference(x, vectors, act, residual))

    read = (x,) if residual is None else (x, residual)
    _run("apply", x, read, (out,), run, as_reference)
    return out


def reduce(
    grad: Tensor,
    x: Tensor,
    bn: BatchNormParams,
    act: str,
    slope: Tensor,
    offset: Tensor,
    total: Tensor | None = None,
    join: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """(d_weight, d_bias); slope, offset and, where there is one, the map total are added to.

    ``total`` has x's shape and the dtype that x is computed in, and does not go with "silu".
    ``join`` is, for act "relu", what :func:`apply` gave with a residual, and the map that dy is
    written to, both as x.
    """
    vectors = affine.vectors_of(bn, x)
    d_weight, d_bias = vector_like(x), vector_like(x)
    results = (d_weight, d_bias, slope, offset)
    joined, masked = join or (None, None)

    def run() -> None:
        _ops.batch_norm_act_reduce.default(
            grad, x, *vectors, ACTS[act], joined, masked, total, *results
        )

    def as_reference() -> None:
        dy, scaled, *values = reference.reduce_reference(grad, x, vectors, act, joined)
        for out, value in zip(results, values, strict=True):
            out.add_(value) if out is slope or out is offset else out.copy_(value)
        if total is not None:
            total.add_(scaled)
        if masked is not None:
            masked.copy_(dy)

    read = [t for t in (grad, x, joined, total) if t is not None]
    written = [t for t in (total, masked) if t is not None]
    _run("reduce", x, read, written, run, as_reference)
    return d_weight, d_bias


def input_gradient(
    grad: Tensor,
    x: Tensor,
    bn: BatchNormParams,
    act: str,
    slope: Tensor,
    offset: Tensor,
    out: Tensor,
) -> Tensor:
    """Write ``dy * scale + (x - mean) * slope + offset`` to out, of x's shape and dtype.

    grad may have x's dtype or, but for "silu", the one that x is computed in. Without ``bn.var``
    and ``bn.weight`` scale is 1: what :func:`reduce` left in a total is finished so.
    """
    vectors = affine.vectors_of(bn, x)

    def run() -> None:
        _ops.batch_norm_act_input_gradient.default(grad, x, *vectors, ACTS[act], slope, offset, out)

    def as_reference() -> None:
        out.copy_(reference.input_gradient_reference(grad, x, vectors, act, slope, offset))

    _run("input_gradient", x, (grad, x), (out,), run, as_reference)
    return out


def vector_like(x: Tensor, zero: bool = False) -> Tensor:
    """A vector with an element for each of x's channels, of the dtype that x is computed in."""
    make = x.new_zeros if zero else x.new_empty
    return make(x.shape[1], dtype=wide_dtype(x))


def wide_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def select(x: Tensor, requested: str = "auto") -> Choice:
    """The backend of every pass on x."""
    forbids = "" if is_pixel_matrix(x) else "a map is no channel slice of a channels_last tensor"
    requested = backends.requested(requested, ("native",))
    return native.select("batch_norm_act", x, requested, forbids)


def is_pixel_matrix(x: Tensor) -> bool:
    """Whether x's pixels follow each other evenly, the channels of each side by side."""
    N, C, H, W = x.shape
    stride_n, stride_c, stride_h, stride_w = x.stride()
    if C > 1 and stride_c != 1:
        return False
    step, length = C, 1
    for size, stride in ((W, stride_w), (H, stride_h), (N, stride_n)):
        if size == 1:
            continue
        if length == 1:
            step = stride
        if stride != step * length:
            return False
        length *= size
    return step >= C


def _run(name: str, x: Tensor, read: Sequence, written: Sequence, run, as_reference) -> None:
    choice = select(x)
    run = as_reference if choice.backend == "reference" else run
    if (recorder := record.active()) is None:
        return run()
    if choice.backend == "reference":
        with recorder.fallback(f"batch_norm_act: {choice.reason}"):
            return run()
    sizes = (sum(t.numel() * t.element_size() for t in group) for group in (read, written))
    with recorder.call(f"batch_norm_act_{name}", *choice, 1, *sizes):
        return run()


@torch.library.register_fake("cvkernels::batch_norm_act_statistics", lib=library)
def _(x, mean, var):
    return None


@torch.library.register_fake("cvkernels::batch_norm_act_apply", lib=library)
def _(x, weight, bias, mean, var, eps, act, residual, out):
    return None


@torch.library.register_fake("cvkernels::batch_norm_act_reduce", lib=library)
def _(
    grad, x, weight, bias, mean, var, eps, act, joined, masked, total, d_weight, d_bias, slope,
    offset,
):  # fmt: skip
    return None


@torch.library.register_fake("cvkernels::batch_norm_act_input_gradient", lib=library)
def _(grad, x, weight, bias, mean, var, eps, act, slope, offset, out):
    return None
