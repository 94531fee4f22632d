"""avg_pool: the contract, plans, the registered ops and the call."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cvkernels import backend as backends
from cvkernels.backend import Backend
from cvkernels.ops.avg_pool.reference import avg_pool_reference
from cvkernels.ops.common import native, norm, pool
from cvkernels.ops.common.arguments import check_bn, check_overlap, integer
from cvkernels.ops.common.dispatch import Call, Implementation, Table, call_of, reference
from cvkernels.ops.common.norm import BatchNormParams
from cvkernels.ops.common.plan import Plan, PlanTable, plan_of, planned_by
from cvkernels.ops.common.pool import checked, window_of
from cvkernels.ops.common.traffic import nbytes

OP = "avg_pool"
ARGUMENTS = (
    "Tensor x, int[2] kernel_size, int[2] stride, int[2] padding, bool ceil_mode, "
    f"bool count_include_pad, int? divisor_override, {norm.ARGUMENTS}"
)

library = torch.library.Library("cvkernels", "FRAGMENT")
library.define(f"avg_pool({ARGUMENTS}) -> Tensor")
library.define(f"avg_pool_out({ARGUMENTS}, Tensor(a!) out) -> ()")
_avg_pool = torch.ops.cvkernels.avg_pool.default
_avg_pool_out = torch.ops.cvkernels.avg_pool_out.default
_plans = PlanTable()

Pair = tuple[int, int]
Options = tuple[Pair, Pair, Pair, bool, bool, int | None]
run_kept, is_traced = native.keeps_calls(2), native.is_traced


def plan(
    x_like: Tensor,
    kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int] | None = None,
    padding: int | tuple[int, int] = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
    *,
    input_bn: BatchNormParams | None = None,
    out: Tensor | None = None,
    backend: Backend = "auto",
    once: bool = False,
) -> Plan:
    """A call of :func:`avg_pool`, as ``plan(x, out=None)``; ``x_like`` and ``out`` are examples."""
    window = window_of(OP, kernel_size, stride, padding, 1, ceil_mode)
    size = checked(OP, x_like, window, out)
    if divisor_override is not None:
        divisor_override = integer(OP, "divisor_override", divisor_override)
    _check(x_like, divisor_override, input_bn)
    call = call_of(x_like, (x_like, input_bn, out), TABLE, backend, once)
    kernel_size, stride, padding, _, ceil_mode = window
    options = (kernel_size, stride, padding, ceil_mode, bool(count_include_pad), divisor_override)
    traffic = pool.traffic(call, window, size, nbytes(*(input_bn or ())[:4]))
    planned = plan_of(TABLE, None, call, (options, input_bn, out), traffic)
    return planned.expecting(call, (input_bn,), x=x_like, out=out)


@planned_by(plan)
def avg_pool(
    x: Tensor,
    kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int] | None = None,
    padding: int | tuple[int, int] = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
    *,
    input_bn: BatchNormParams | None = None,
    out: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """The mean of each window of each channel, as ``torch.nn.functional.avg_pool2d``.

    ``out[n, c, p, q] = sum over r, s of u[n, c, p*stride - padding + r, q*stride - padding + s] /
    divisor`` with ``u = x``, or ``u = relu(input_bn(x))``; zero padding is applied to ``u``.

    Args:
        x: Tensor[N, C, H, W], float32, float16, bfloat16 or float64; any strides, channels_last and
            channel slices of a channels_last buffer are fast.
        kernel_size: in pixels, (height, width) or one number for both; so are the next two.
        stride: kernel_size if None.
        padding: at most half of kernel_size.
        ceil_mode: a last window may run over the right and lower edge, if it starts inside x or its
            left or upper padding.
        count_include_pad: whether the divisor counts the padding of a window too.
        divisor_override: the divisor, in place of the number of pixels.
        input_bn: vectors Tensor[C] of any floating dtype; a ReLU follows it. Read live, at every
            call.
        out: Tensor[N, C, P, Q] to write into, dtype and device of x; any strides, such as a channel
            slice ``buffer[:, a:b]`` of a channels_last tensor.
        backend: see :mod:`cvkernels.backend`. "auto" runs the native op on CPU and CUDA tensors;
            the reference runs where the compiled part is missing or has no code for the GPU, if a
            gradient is needed, for float64 on CUDA, and for CPU tensors under torch.compile
            (inductor generates this op).

    Returns:
        Tensor[N, C, P, Q], dtype of x; channels_last if x's channels have stride 1, else
        contiguous. ``out`` itself where given, with nothing outside it written; else never a view
        of x. The sum is in float32 (float64 for float64). N = 0 gives an empty output.

    Raises:
        ValueError: x is not 4-dimensional, an option is out of range, no window fits, out's shape
            or device does not fit, out overlaps an argument (not seen under torch.compile) or
            itself, or out is a leaf that requires a gradient.
        TypeError: dtype not listed above, out's dtype is not x's, or an option is not of integers.
        RuntimeError: x has another dtype or no window fits; is a TypeError or ValueError as well.
        BackendError: the requested backend cannot run this call.

    Differentiable in x and input_bn through the reference. Source: LeCun et al. 1998; the norm and
    ReLU in front are the transition's of Huang et al. 2017, arXiv:1608.06993.
    """
    if input_bn is None and not is_traced():
        y = run_kept(
            x, out, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override,
            backend,
        )  # fmt: skip
        if y is not None:
            return y
    options = (kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)
    if torch.compiler.is_compiling():
        made = plan(x, *options, input_bn=input_bn, out=out, backend=backend, once=True)
        return made.run(x, out)
    window = window_of(OP, kernel_size, stride, padding, 1, ceil_mode)
    key = None
    if input_bn is None and (divisor_override is None or type(divisor_override) is int):
        key = _plans.key(backend, (x, out), window, count_include_pad, divisor_override)
    if (planned := _plans.get(key)) is None:
        planned = plan(
            x, *options, input_bn=input_bn, out=out, backend=backend, once=key is None
        )  # fmt: skip
        _plans.keep(key, planned, x, out)
        if key is not None:
            native.keep_call(run_kept, planned, *options, backend)
    if out is not None:
        check_overlap(OP, out, {"x": x, "input_bn": input_bn})
    return planned.recorded(x, out)


backends.answers(OP, plan)


def _check(x: Tensor, divisor_override: int | None, input_bn: BatchNormParams | None) -> None:
    if divisor_override == 0:
        raise ValueError("avg_pool: divisor_override must not be 0")
    if input_bn is not None:
        check_bn(OP, "input_bn", input_bn, x.shape[1], x)


def _plan_native(
    problem: None,
    call: Call,
    options: Options,
    input_bn: BatchNormParams | None,
    out: Tensor | None,
) -> Callable[..., Tensor]:
    vectors = norm.vectors_of(input_bn, call.x) or norm.NO_VECTORS
    return pool.plan_native(
        call,
        out,
        lambda x: _avg_pool(x, *options, *vectors),
        lambda x, out: _avg_pool_out(x, *options, *vectors, out),
        vectors[:4],
    )


def _plan_reference(
    problem: None,
    call: Call,
    options: Options,
    input_bn: BatchNormParams | None,
    out: Tensor | None,
) -> Callable[..., Tensor]:
    bn = norm.vectors_of(input_bn, call.x)
    return pool.plan_reference(lambda x: avg_pool_reference(x, *options, bn))


TABLE = Table(
    OP,
    Implementation(
        "native", pool.why_not_native(OP, "has none"), _plan_native, native.compiled_for
    ),
    reference(_plan_reference),
)


@torch.library.register_fake("cvkernels::avg_pool", lib=library)
def _(x, kernel_size, stride, padding, ceil_mode, *_):
    return pool.empty_pooled(x, avg_pool_reference(x, kernel_size, stride, padding, ceil_mode))


native.writes(library, "avg_pool_out")
