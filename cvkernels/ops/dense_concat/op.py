"""dense_concat: the contract, the choice of a backend, the registered op and the call."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cvkernels import backend as backends
from cvkernels import record
from cvkernels.backend import Backend, Choice
from cvkernels.ops.common import affine, aliasing, native
from cvkernels.ops.common.arguments import check_bn
from cvkernels.ops.common.norm import BatchNormParams
from cvkernels.ops.dense_concat.reference import appended

DTYPES = native.DTYPES["cpu"]

library = torch.library.Library("cvkernels", "FRAGMENT")
library.define(
    f"dense_concat(Tensor(a!) buffer, Tensor src, int start, {affine.ARGUMENTS}, bool relu) -> ()"
)
_dense_concat = torch.ops.cvkernels.dense_concat.default


def dense_concat(
    buffer: Tensor,
    src: Tensor,
    start: int,
    bn: BatchNormParams | None = None,
    relu: bool = False,
    *,
    backend: Backend = "auto",
) -> Tensor:
    """Write ``relu(bn(src))`` into the channels [start, start + C) of a feature buffer, in place.

    ``buffer[:, start : start + C] = relu(src * scale + shift)``, with scale and shift of the norm
    per channel, and each of the two optional. Layers that share one buffer concatenate without
    copying what is there.

    Args:
        buffer: Tensor[N, C_total, H, W], float32, float16, bfloat16 or float64; any strides,
            channels_last is fast. Written in place.
        src: Tensor[N, C, H, W], dtype and device of buffer; any strides, channels_last and channel
            slices of a channels_last tensor are fast. It shares no element with the slice.
        start: first channel of the slice.
        bn: vectors Tensor[C] of any floating dtype; read live, at every call.
        relu: whether negative values become 0.
        backend: see :mod:`cvkernels.backend`. "auto" runs the native op on CPU and CUDA tensors;
            the reference runs where the compiled part is missing or has no code for the GPU, for
            float64 on CUDA, and for CPU tensors under torch.compile (inductor generates this op).

    Returns:
        buffer, with nothing outside the slice written. Without bn and relu the bits of src are
        moved. The arithmetic is in float32 (float64 for float64), rounded once; NaN stays NaN.

    Raises:
        ValueError: a shape or device does not fit, the slice is not within the buffer, buffer
            overlaps itself, src overlaps the slice (not seen under torch.compile), or a tensor
            requires a gradient.
        TypeError: a dtype is not listed above, src's is not buffer's; bn is not BatchNormParams.
        BackendError: the requested backend cannot run this call.

    Not differentiable. Source: the shared storage of Pleiss et al. 2017, arXiv:1707.06990, in
    inference; the affine map and ReLU are Huang et al. 2017's, arXiv:1608.06993.
    """
    if bn is None and native.at_once(backend, buffer, src):
        try:
            if not aliasing.one_storage(buffer, src):
                _dense_concat(buffer, src, start, *affine.NO_VECTORS, relu)
                native.mark_written(buffer)
                return buffer
        except native.REFUSED:
            pass
    _check(buffer, src, start, bn)
    choice = native.select("dense_concat", buffer, backends.requested(backend, ("native",)))
    run = _reference if choice.backend == "reference" else _native
    if (recorder := record.active()) is None:
        return run(buffer, src, start, bn, relu)
    if choice.backend == "reference":
        with recorder.fallback(f"dense_concat: {choice.reason}"):
            return run(buffer, src, start, bn, relu)
    moved = src.numel() * src.element_size()
    with recorder.call("dense_concat", *choice, 1, moved + affine.vector_bytes(bn), moved):
        return run(buffer, src, start, bn, relu)


def choose(
    buffer: Tensor,
    src: Tensor,
    start: int,
    bn: BatchNormParams | None = None,
    relu: bool = False,
    *,
    backend: Backend = "auto",
) -> Choice:
    """The backend that :func:`dense_concat` runs for these arguments, and the rule behind it."""
    _check(buffer, src, start, bn)
    return native.select("dense_concat", buffer, backends.requested(backend, ("native",)))


backends.answers("dense_concat", choose)


def appender(
    src: Tensor, bn: BatchNormParams | None, relu: bool
) -> Callable[[Tensor, Tensor], None] | None:
    """What writes ``relu(bn(src))`` over a whole buffer for others like src, and checks nothing.

    Called as ``append(buffer, src)``. It holds bn's vectors as they are now. None where "auto" runs
    no native op.
    """
    if native.select("dense_concat", src, "auto").backend != "native":
        return None
    vectors = affine.vectors_of(bn, src) or affine.NO_VECTORS
    return lambda buffer, src: _dense_concat(buffer, src, 0, *vectors, relu)


def _native(
    buffer: Tensor, src: Tensor, start: int, bn: BatchNormParams | None, relu: bool
) -> Tensor:
    native.mark_written(buffer)
    vectors = affine.vectors_of(bn, src) or affine.NO_VECTORS
    _dense_concat(buffer, src, start, *vectors, relu)
    return buffer


def _reference(
    buffer: Tensor, src: Tensor, start: int, bn: BatchNormParams | None, relu: bool
) -> Tensor:
    target = buffer[:, start : start + src.shape[1]]
    target.copy_(appended(src, affine.vectors_of(bn, src), relu))
    return buffer


@torch.library.register_fake("cvkernels::dense_concat", lib=library)
def _(buffer, src, start, weight, bias, mean, var, eps, relu):
    return None


def _check(buffer: Tensor, src: Tensor, start: int, bn: BatchNormParams | None) -> None:
    for name, tensor in (("buffer", buffer), ("src", src)):
        if tensor.dim() != 4:
            raise ValueError(
                f"dense_concat: {name} must have shape [N, C, H, W], got {list(tensor.shape)}; "
                f"give a single image a batch of one with {name}[None]"
            )
    if buffer.dtype not in DTYPES:
        raise TypeError(
            f"dense_concat: buffer must be float32, float16, bfloat16 or float64, got "
            f"{buffer.dtype}"
        )
    if src.dtype != buffer.dtype:
        raise TypeError(
            f"dense_concat: src must have buffer's dtype, {buffer.dtype}, got {src.dtype}; "
            f"convert it with src.to(buffer.dtype)"
        )
    if src.device != buffer.device:
        raise ValueError(
            f"dense_concat: src must be on buffer's device, {buffer.device}, got {src.device}; "
            f"move it with src.to(buffer.device)"
        )
    N, C, H, W = src.shape
    if (N, H, W) != (buffer.shape[0], *buffer.shape[2:]):
        raise ValueError(
            f"dense_concat: src must have buffer's N, H and W, got shape {list(src.shape)} for a "
            f"buffer of {list(buffer.shape)}"
        )
    if start < 0 or start + C > buffer.shape[1]:
        raise ValueError(
            f"dense_concat: channels [{start}, {start + C}) are not within the buffer's "
            f"{buffer.shape[1]}; make the buffer larger, or start in it"
        )
    strides = zip(buffer.shape, buffer.stride(), strict=True)
    if any(stride == 0 and size > 1 for size, stride in strides):
        raise ValueError(
            f"dense_concat: buffer must not overlap itself, got strides "
            f"{list(buffer.stride())}; write into a tensor that is not expanded"
        )
    if bn is not None:
        check_bn("dense_concat", "bn", bn, src.shape[1], src)
    if affine.needs_grad(buffer, src, bn):
        raise ValueError(
            "dense_concat: buffer, src and bn must not require a gradient, and one of them does; "
            "call it under torch.no_grad(), or use torch.cat"
        )
    # A traced tensor has no storage to ask about.
    if not torch.compiler.is_compiling() and aliasing.overlap(src, buffer[:, start : start + C]):
        raise ValueError(
            f"dense_concat: src overlaps the channels [{start}, {start + C}) of the buffer that it "
            f"is written to; write into other channels, or from another tensor"
        )
