"""max_pool: the contract, plans, the registered ops and the call."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cvkernels import backend as backends
from cvkernels.backend import Backend
from cvkernels.ops.common import native
from cvkernels.ops.common.dispatch import Call, Implementation, call_of, choose, reference
from cvkernels.ops.common.plan import Plan, PlanTable, planned_by
from cvkernels.ops.common.pool import (
    Window,
    check_overlap,
    checked,
    plan_native,
    touched,
    window_of,
)
from cvkernels.ops.common.traffic import Traffic
from cvkernels.ops.max_pool.reference import max_pool_reference

OP = "max_pool"
ARGUMENTS = (
    "Tensor x, int[2] kernel_size, int[2] stride, int[2] padding, int[2] dilation, bool ceil_mode"
)

library = torch.library.Library("cvkernels", "FRAGMENT")
library.define(f"max_pool({ARGUMENTS}) -> Tensor")
library.define(f"max_pool_out({ARGUMENTS}, Tensor(a!) out) -> ()")
_max_pool = torch.ops.cvkernels.max_pool.default
_max_pool_out = torch.ops.cvkernels.max_pool_out.default
_plans = PlanTable()


def plan(
    x_like: Tensor,
    kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int] | None = None,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    ceil_mode: bool = False,
    *,
    out: Tensor | None = None,
    backend: Backend = "auto",
    once: bool = False,
) -> Plan:
    """A call of :func:`max_pool`, as ``plan(x, out=None)``; ``x_like`` and ``out`` are examples."""
    window = window_of(OP, kernel_size, stride, padding, dilation, ceil_mode)
    P, Q = checked(OP, x_like, window, out)
    call = call_of(x_like, (x_like, out), TABLE, backend, once)
    implementation, (name, reason) = choose(OP, TABLE, None, call)
    run = implementation.build(call, window, out)
    shape, itemsize = x_like.shape, x_like.element_size()

    def traffic() -> Traffic:
        read = itemsize * touched(shape, window, (P, Q))
        return Traffic(1, read, itemsize * shape[0] * shape[1] * P * Q)

    return Plan(OP, name, reason, run, traffic)


@planned_by(plan)
def max_pool(
    x: Tensor,
    kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int] | None = None,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    ceil_mode: bool = False,
    *,
    out: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """The largest element of each window of each channel, as ``torch.nn.functional.max_pool2d``.

    ``out[n, c, p, q] = max over r, s of x[n, c, p*stride - padding + r*dilation, q*stride - padding
    + s*dilation]``, over the taps inside x. NaN is larger than everything.

    Args:
        x: Tensor[N, C, H, W], float32, float16, bfloat16 or float64; any strides, channels_last and
            channel slices of a channels_last buffer are fast.
        kernel_size: in pixels, (height, width) or one number for both; so are the next three.
        stride: kernel_size if None.
        padding: with -inf, at most half of kernel_size.
        dilation: between neighbouring taps of a window.
        ceil_mode: a last window may run over the right and lower edge, if it starts inside x or its
            left or upper padding.
        out: Tensor[N, C, P, Q] to write into, dtype and device of x; any strides, such as a channel
            slice ``buffer[:, a:b]`` of a channels_last tensor.
        backend: see :mod:`cvkernels.backend`. "auto" runs the native op on CPU and CUDA tensors;
            the reference runs where the compiled part is missing or has no code for the GPU, if a
            gradient is needed, for float64 on CUDA, and for CPU tensors under torch.compile
            (inductor generates this op).

    Returns:
        Tensor[N, C, P, Q], dtype of x; channels_last if x's channels have stride 1, else
        contiguous. ``out`` itself where given, with nothing outside it written; else never a view
        of x. No indices are computed. Equal to max_pool2d by value: the sign of a zero and the bits
        of a NaN are not promised. N = 0 gives an empty output.

    Raises:
        ValueError: x is not 4-dimensional, an option is out of range, no window fits, out's shape
            or device does not fit, or out overlaps x (not seen under torch.compile) or itself.
        TypeError: dtype not listed above, out's dtype is not x's, or an option is not of integers.
        RuntimeError: x has another dtype or no window fits; is a TypeError or ValueError as well.
        BackendError: the requested backend cannot run this call.

    Differentiable in x through the reference, which keeps indices. Source: LeCun et al. 1998,
    with max for mean as in Krizhevsky et al. 2012.
    """
    stride = kernel_size if stride is None else stride
    options = (kernel_size, stride, padding, dilation, ceil_mode)
    if torch.compiler.is_compiling():
        return _traced(x, options, out, backend)
    if not type(kernel_size) is type(stride) is type(padding) is type(dilation) is int:
        options = window_of(OP, *options)
    key = _plans.key(backend, (x, out), options)
    if (planned := _plans.get(key)) is None:
        planned = plan(x, *options, out=out, backend=backend, once=key is None)
        _plans.keep(key, planned, x, out)
    if out is None:
        return planned(x)
    check_overlap(OP, out, x)
    return planned(x, out)


backends.answers(OP, plan)


def _why_not_native(problem: None, call: Call) -> str:
    if call.grad:
        return "a gradient is needed, and the native max_pool keeps no indices"
    return native.lacks(OP, call)


def _plan_native(call: Call, window: Window, out: Tensor | None) -> Callable[..., Tensor]:
    return plan_native(
        call, out, lambda x: _max_pool(x, *window), lambda x, out: _max_pool_out(x, *window, out)
    )


def _plan_reference(call: Call, window: Window, out: Tensor | None) -> Callable[..., Tensor]:
    def run(x, out=None):
        pooled = max_pool_reference(x, *window)
        return pooled if out is None else out.copy_(pooled)

    return run


TABLE = (
    Implementation("native", _why_not_native, _plan_native, native.compiled_for),
    reference(_plan_reference),
)


def _traced(x: Tensor, options: tuple, out: Tensor | None, backend: Backend) -> Tensor:
    """The call under torch.compile: the registered op, or on CPU the reference for inductor."""
    window = window_of(OP, *options)
    checked(OP, x, window, out)
    call = call_of(x, (x, out), TABLE, backend)
    if choose(OP, TABLE, None, call)[1].backend == "reference":
        pooled = max_pool_reference(x, *window)
        return pooled if out is None else out.copy_(pooled)
    if out is None:
        return _max_pool(x, *window)
    _max_pool_out(x, *window, out)
    return out


@torch.library.register_fake("cvkernels::max_pool", lib=library)
def _max_pool_fake(x, kernel_size, stride, padding, dilation, ceil_mode):
    pooled = max_pool_reference(x, kernel_size, stride, padding, dilation, ceil_mode)
    channels_last = x.stride(1) == 1 and x.shape[1] > 1
    return torch.empty_like(
        pooled, memory_format=torch.channels_last if channels_last else torch.contiguous_format
    )


@torch.library.register_fake("cvkernels::max_pool_out", lib=library)
def _max_pool_out_fake(x, kernel_size, stride, padding, dilation, ceil_mode, out):
    return None
