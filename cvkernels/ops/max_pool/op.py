"""max_pool: the contract, plans, the registered ops and the call."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cvkernels import backend as backends
from cvkernels.backend import Backend
from cvkernels.ops.common import native, pool
from cvkernels.ops.common.arguments import check_overlap
from cvkernels.ops.common.dispatch import Call, Implementation, Table, call_of, reference
from cvkernels.ops.common.plan import Plan, PlanTable, plan_of, planned_by
from cvkernels.ops.common.pool import Window, checked, window_of
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
run_kept, is_traced = native.keeps_calls(2), native.is_traced


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
    size = checked(OP, x_like, window, out)
    call = call_of(x_like, (x_like, out), TABLE, backend, once)
    traffic = pool.traffic(call, window, size)
    return plan_of(TABLE, None, call, (window, out), traffic).expecting(call, x=x_like, out=out)


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
            or device does not fit, out overlaps x (not seen under torch.compile) or itself, or out
            is a leaf that requires a gradient.
        TypeError: dtype not listed above, out's dtype is not x's, or an option is not of integers.
        RuntimeError: x has another dtype or no window fits; is a TypeError or ValueError as well.
        BackendError: the requested backend cannot run this call.

    Differentiable in x through the reference, which keeps indices. Source: LeCun et al. 1998,
    with max for mean as in Krizhevsky et al. 2012.
    """
    if not is_traced():
        y = run_kept(x, out, kernel_size, stride, padding, dilation, ceil_mode, backend)
        if y is not None:
            return y
    options = (kernel_size, stride, padding, dilation, ceil_mode)
    if torch.compiler.is_compiling():
        return plan(x, *options, out=out, backend=backend, once=True).run(x, out)
    window = window_of(OP, *options)
    key = _plans.key(backend, (x, out), window)
    if (planned := _plans.get(key)) is None:
        planned = plan(x, *window, out=out, backend=backend, once=key is None)
        _plans.keep(key, planned, x, out)
        native.keep_call(run_kept, planned, *options, backend)
    if out is not None:
        check_overlap(OP, out, {"x": x})
    return planned.recorded(x, out)


backends.answers(OP, plan)


def _plan_native(
    problem: None, call: Call, window: Window, out: Tensor | None
) -> Callable[..., Tensor]:
    return pool.plan_native(
        call, out, lambda x: _max_pool(x, *window), lambda x, out: _max_pool_out(x, *window, out)
    )


def _plan_reference(
    problem: None, call: Call, window: Window, out: Tensor | None
) -> Callable[..., Tensor]:
    return pool.plan_reference(lambda x: max_pool_reference(x, *window))


TABLE = Table(
    OP,
    Implementation(
        "native", pool.why_not_native(OP, "keeps no indices"), _plan_native, native.compiled_for
    ),
    reference(_plan_reference),
)


@torch.library.register_fake("cvkernels::max_pool", lib=library)
def _(x, *window):
    return pool.empty_pooled(x, max_pool_reference(x, *window))


native.writes(library, "max_pool_out")
