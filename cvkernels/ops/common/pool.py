"""What the pooling ops share: their windows, the checks of their arguments and the byte model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cvkernels.ops.common import native
from cvkernels.ops.common.arguments import check_out, check_size, check_tensors, integer
from cvkernels.ops.common.autograd import mark_written
from cvkernels.ops.common.dispatch import Call
from cvkernels.ops.common.errors import InputTypeError, InputValueError
from cvkernels.ops.common.layout import format_of, is_nhwc
from cvkernels.ops.common.recycled import maker
from cvkernels.ops.common.traffic import Traffic, touched_positions

DTYPES = native.DTYPES["cpu"]


class Window(NamedTuple):
    """The options of a call in the registered op's order; pairs are (height, width)."""

    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    ceil_mode: bool


def window_of(
    op: str, kernel_size: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool
) -> Window:
    """The checked options of a call of ``op``."""
    kernel_size = _pair(op, kernel_size, "kernel_size", 1)
    return Window(
        kernel_size,
        kernel_size if stride is None else _pair(op, stride, "stride", 1),
        _pair(op, padding, "padding", 0),
        _pair(op, dilation, "dilation", 1),
        bool(ceil_mode),
    )


def _pair(op: str, value: Any, name: str, least: int) -> tuple[int, int]:
    values = value if isinstance(value, (tuple, list)) else (value,)
    if len(values) not in (1, 2):
        raise TypeError(f"{op}: {name} must be an integer or a pair of them, got {value!r}")
    pair = (integer(op, name, values[0]), integer(op, name, values[-1]))
    if min(pair) < least:
        raise ValueError(f"{op}: {name} must be at least {least}, got {value!r}")
    return pair


def checked(op: str, x: Tensor, window: Window, out: Tensor | None) -> tuple[int, int]:
    """Check a call's arguments; P and Q."""
    check_tensors(op, {"out": out}, x=x)
    if x.dim() != 4:
        raise ValueError(
            f"{op}: x must have shape [N, C, H, W], got {list(x.shape)}; "
            f"give a single image a batch of one with x[None]"
        )
    if x.dtype not in DTYPES:
        raise InputTypeError(
            f"{op}: x must be float32, float16, bfloat16 or float64, got {x.dtype}; "
            f"convert it, or use torch.nn.functional.{op}2d"
        )
    N, C, H, W = x.shape
    size = (window_count(op, H, 0, window), window_count(op, W, 1, window))
    if C == 0 or size[0] <= 0 or size[1] <= 0:
        raise InputValueError(
            f"{op}: no window fits x of shape {list(x.shape)} with kernel_size "
            f"{window.kernel_size}, padding {window.padding} and dilation {window.dilation}"
        )
    check_size(op, "the result", math.prod((N, C, *size)), x.dtype)
    if out is not None:
        check_out(op, out, x, (N, C, *size))
        _check_writable(op, out)
    return size


def _check_writable(op: str, out: Tensor) -> None:
    """That autograd lets out be written: not where it is a leaf, or a view of one."""
    written = out if out._base is None else out._base
    if torch.is_grad_enabled() and written.requires_grad and written.is_leaf:
        raise ValueError(
            f"{op}: out is a leaf that requires a gradient, which must not be written; call it "
            f"under torch.no_grad(), or write into another tensor"
        )


def window_count(op: str, size: int, axis: int, window: Window) -> int:
    """How many windows one axis has."""
    kernel, stride = window.kernel_size[axis], window.stride[axis]
    padding, dilation = window.padding[axis], window.dilation[axis]
    if 2 * padding > kernel:
        raise ValueError(
            f"{op}: padding must be at most half of kernel_size, got padding {padding} for a "
            f"kernel of {kernel}; pad x itself"
        )
    span = size + 2 * padding - dilation * (kernel - 1) - 1
    if not window.ceil_mode:
        return span // stride + 1 if size > 0 else 0
    count = -(-span // stride) + 1
    # The last window must start inside the input or its left padding.
    return count - 1 if (count - 1) * stride >= size + padding else count


def with_padding(x: Tensor, window: Window) -> tuple[Tensor, Window]:
    """x and a window that give the same maxima, and their gradient.

    Where dilated taps step over a small map, a window may hold padding alone. ``max_pool2d`` then
    gives -inf with an index outside of the map, and its backward pass writes there; so the padding
    becomes a part of x.
    """
    axes = list(zip(x.shape[2:], *window[:4], strict=True))
    if not any(
        start % dilation >= size  # its first tap that is not above or left of the map
        for size, _, stride, padding, dilation in axes
        if dilation > 1
        for start in range(-padding, 0, stride)
    ):
        return x, window
    sides: list[int] = []
    for axis, (size, kernel, stride, padding, dilation) in enumerate(axes):
        count = window_count("max_pool", size, axis, window)
        end = (count - 1) * stride + dilation * (kernel - 1) + 1
        sides = [padding, end - size - padding, *sides]  # F.pad takes the last axis first
    padded = F.pad(x, sides, value=-math.inf)
    return padded, window._replace(padding=(0, 0), ceil_mode=False)


def touched(shape: Sequence[int], window: Window, size: tuple[int, int]) -> int:
    """How many elements of a map of this shape some window reads."""
    N, C, *sizes = shape
    axes = zip(sizes, *window[:4], size, strict=True)
    return N * C * math.prod(touched_positions(*axis) for axis in axes)


def traffic(call: Call, window: Window, size: tuple[int, int], vectors: int = 0) -> Callable:
    """The byte model of a call with ``size`` windows and so many bytes of vectors."""
    x = call.x

    def traffic(name: str) -> Traffic:
        read = x.element_size() * touched(x.shape, window, size) + vectors
        return Traffic(1, read, x.element_size() * math.prod((*x.shape[:2], *size)))

    return traffic


def why_not_native(op: str, lacking: str) -> Callable[[object, Call], str]:
    def refuses(problem: object, call: Call) -> str:
        if call.grad:
            return f"a gradient is needed, and the native {op} {lacking}"
        return native.lacks(op, call)

    return refuses


def plan_reference(compute: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """``compute``, as (x, out=None)."""

    def run(x, out=None):
        pooled = compute(x)
        return pooled if out is None else out.copy_(pooled)

    return run


def empty_pooled(x: Tensor, pooled: Tensor) -> Tensor:
    """What the native ops return for x, given the reference's result."""
    return torch.empty_like(pooled, memory_format=format_of(is_nhwc(x)))


def plan_native(
    call: Call,
    out: Tensor | None,
    compute: Callable[..., Tensor],
    into: Callable[..., None],
    vectors: Sequence[Tensor | None] = (),
) -> Callable[..., Tensor]:
    """What pools maps like x, as (x, out=None), by an op that returns and one that takes out.

    ``vectors`` are the ops' tensors between x and out.
    """

    def run(x, out=None):
        if out is None:
            return compute(x)
        mark_written(out)
        into(x, out)
        return out

    if not native.directs(call) or not call.x.shape[0]:
        return run
    x, y = call.x, compute(call.x) if out is None else out
    work, new_result = native.direct(lambda: into(x, y)), maker(y)
    between = [0 if t is None else t.data_ptr() for t in vectors]

    def run_directly(x, out=None):
        if out is None:
            y = new_result()
        else:
            y = out
            mark_written(out)
        if between:  # unpacking none of them costs a tenth of the call
            work(x.data_ptr(), *between, y.data_ptr())
        else:
            work(x.data_ptr(), y.data_ptr())
        return y

    run_directly.held = vectors  # type: ignore[attr-defined]  # the memory at their addresses
    if not any(between):
        recipe = native.recipe(work, (x, out), (y,) if out is None else (), (y,))
        run_directly.recipe = recipe  # type: ignore[attr-defined]
    return run_directly
