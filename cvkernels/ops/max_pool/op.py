"""max_pool: the contract, the choice of a backend, the registered ops and the call."""

from __future__ import annotations

import torch
from torch import Tensor

from cvkernels import backend as backends
from cvkernels import record
from cvkernels.backend import Backend, Choice
from cvkernels.ops.common import native
from cvkernels.ops.common.pool import Window, checked, touched, window_of
from cvkernels.ops.max_pool.reference import max_pool_reference

ARGUMENTS = (
    "Tensor x, int[2] kernel_size, int[2] stride, int[2] padding, int[2] dilation, bool ceil_mode"
)

library = torch.library.Library("cvkernels", "FRAGMENT")
library.define(f"max_pool({ARGUMENTS}) -> Tensor")
library.define(f"max_pool_out({ARGUMENTS}, Tensor(a!) out) -> ()")
_max_pool = torch.ops.cvkernels.max_pool.default
_max_pool_out = torch.ops.cvkernels.max_pool_out.default


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
    if out is None and native.at_once(backend, x):
        try:
            step = kernel_size if stride is None else stride
            return _max_pool(x, kernel_size, step, padding, dilation, ceil_mode)
        except native.REFUSED:
            pass
    window = window_of("max_pool", kernel_size, stride, padding, dilation, ceil_mode)
    size = checked("max_pool", x, window, out)
    backend_name, reason = _select(x, out, backends.requested(backend, ("native",)))
    recorder = record.active()
    if backend_name == "reference":
        if recorder is None:
            return _reference(x, window, out)
        with recorder.fallback(f"max_pool: {reason}"):
            return _reference(x, window, out)
    if recorder is None:
        return _native(x, window, out)
    itemsize = x.element_size()
    bytes_read = itemsize * touched(x, window, size)
    bytes_written = itemsize * x.shape[0] * x.shape[1] * size[0] * size[1]
    with recorder.call("max_pool", backend_name, reason, 1, bytes_read, bytes_written):
        return _native(x, window, out)


def choose(
    x: Tensor,
    kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int] | None = None,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    ceil_mode: bool = False,
    *,
    out: Tensor | None = None,
    backend: Backend = "auto",
) -> Choice:
    """The backend that :func:`max_pool` runs for the same arguments, and the rule that chose it."""
    window = window_of("max_pool", kernel_size, stride, padding, dilation, ceil_mode)
    checked("max_pool", x, window, out)
    return _select(x, out, backends.requested(backend, ("native",)))


backends.answers("max_pool", choose)


def _select(x: Tensor, out: Tensor | None, requested: str) -> Choice:
    forbids = ""
    if torch.is_grad_enabled() and (x.requires_grad or (out is not None and out.requires_grad)):
        forbids = "a gradient is needed, and the native max_pool keeps no indices"
    return native.select("max_pool", x, requested, forbids)


def _native(x: Tensor, window: Window, out: Tensor | None) -> Tensor:
    if out is None:
        return _max_pool(x, *window)
    native.mark_written(out)
    _max_pool_out(x, *window, out)
    return out


def _reference(x: Tensor, window: Window, out: Tensor | None) -> Tensor:
    pooled = max_pool_reference(x, *window)
    return pooled if out is None else out.copy_(pooled)


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
