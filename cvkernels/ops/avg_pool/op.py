"""avg_pool: the contract, the choice of a backend, the registered ops and the call."""

from __future__ import annotations

import torch
from torch import Tensor

from cvkernels import backend as backends
from cvkernels import record
from cvkernels.backend import Backend, Choice
from cvkernels.ops.avg_pool.reference import avg_pool_reference
from cvkernels.ops.common import affine, native
from cvkernels.ops.common.arguments import check_bn
from cvkernels.ops.common.norm import BatchNormParams
from cvkernels.ops.common.pool import Window, checked, touched, window_of

ARGUMENTS = (
    "Tensor x, int[2] kernel_size, int[2] stride, int[2] padding, bool ceil_mode, "
    f"bool count_include_pad, int? divisor_override, {affine.ARGUMENTS}"
)

library = torch.library.Library("cvkernels", "FRAGMENT")
library.define(f"avg_pool({ARGUMENTS}) -> Tensor")
library.define(f"avg_pool_out({ARGUMENTS}, Tensor(a!) out) -> ()")
_avg_pool = torch.ops.cvkernels.avg_pool.default
_avg_pool_out = torch.ops.cvkernels.avg_pool_out.default


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
            or device does not fit, or out overlaps x (not seen under torch.compile) or itself.
        TypeError: dtype not listed above, out's dtype is not x's, or an option is not of integers.
        RuntimeError: x has another dtype or no window fits; is a TypeError or ValueError as well.
        BackendError: the requested backend cannot run this call.

    Differentiable in x and input_bn through the reference. Source: LeCun et al. 1998; the norm and
    ReLU in front are the transition's of Huang et al. 2017, arXiv:1608.06993.
    """
    if out is None and input_bn is None and native.at_once(backend, x):
        try:
            step = kernel_size if stride is None else stride
            return _avg_pool(
                x, kernel_size, step, padding, ceil_mode, count_include_pad, divisor_override,
                *affine.NO_VECTORS,
            )  # fmt: skip
        except native.REFUSED:
            pass
    window = window_of("avg_pool", kernel_size, stride, padding, 1, ceil_mode)
    size = _checked(x, window, divisor_override, input_bn, out)
    choice = _select(x, input_bn, out, backends.requested(backend, ("native",)))
    options = (bool(count_include_pad), divisor_override, affine.vectors_of(input_bn, x))
    run = _reference if choice.backend == "reference" else _native
    if (recorder := record.active()) is None:
        return run(x, window, options, out)
    if choice.backend == "reference":
        with recorder.fallback(f"avg_pool: {choice.reason}"):
            return run(x, window, options, out)
    itemsize = x.element_size()
    bytes_read = itemsize * touched(x, window, size) + affine.vector_bytes(input_bn)
    bytes_written = itemsize * x.shape[0] * x.shape[1] * size[0] * size[1]
    with recorder.call("avg_pool", *choice, 1, bytes_read, bytes_written):
        return run(x, window, options, out)


def choose(
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
) -> Choice:
    """The backend that :func:`avg_pool` runs for the same arguments, and the rule that chose it."""
    window = window_of("avg_pool", kernel_size, stride, padding, 1, ceil_mode)
    _checked(x, window, divisor_override, input_bn, out)
    return _select(x, input_bn, out, backends.requested(backend, ("native",)))


backends.answers("avg_pool", choose)


def _checked(
    x: Tensor,
    window: Window,
    divisor_override: int | None,
    input_bn: BatchNormParams | None,
    out: Tensor | None,
) -> tuple[int, int]:
    size = checked("avg_pool", x, window, out)
    if divisor_override is not None and not isinstance(divisor_override, int):
        raise TypeError(
            f"avg_pool: divisor_override must be an integer or None, got {divisor_override!r}"
        )
    if divisor_override == 0:
        raise ValueError("avg_pool: divisor_override must not be 0")
    if input_bn is not None:
        check_bn("avg_pool", "input_bn", input_bn, x.shape[1], x)
    return size


def _select(
    x: Tensor, input_bn: BatchNormParams | None, out: Tensor | None, requested: str
) -> Choice:
    forbids = ""
    if affine.needs_grad(x, input_bn, out):
        forbids = "a gradient is needed, and the native avg_pool has none"
    return native.select("avg_pool", x, requested, forbids)


def _native(x: Tensor, window: Window, options: tuple, out: Tensor | None) -> Tensor:
    kernel_size, stride, padding, _, ceil_mode = window
    count_include_pad, divisor_override, bn = options
    arguments = (kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)
    vectors = bn or affine.NO_VECTORS
    if out is None:
        return _avg_pool(x, *arguments, *vectors)
    native.mark_written(out)
    _avg_pool_out(x, *arguments, *vectors, out)
    return out


def _reference(x: Tensor, window: Window, options: tuple, out: Tensor | None) -> Tensor:
    kernel_size, stride, padding, _, ceil_mode = window
    pooled = avg_pool_reference(x, kernel_size, stride, padding, ceil_mode, *options)
    return pooled if out is None else out.copy_(pooled)


@torch.library.register_fake("cvkernels::avg_pool", lib=library)
def _(x, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override, *vectors):
    pooled = avg_pool_reference(x, kernel_size, stride, padding, ceil_mode)
    channels_last = x.stride(1) == 1 and x.shape[1] > 1
    return torch.empty_like(
        pooled, memory_format=torch.channels_last if channels_last else torch.contiguous_format
    )


@torch.library.register_fake("cvkernels::avg_pool_out", lib=library)
def _(*arguments):
    return None
