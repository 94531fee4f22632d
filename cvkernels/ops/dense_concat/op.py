"""dense_concat: the contract, plans, the registered op and the call."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cvkernels import backend as backends
from cvkernels.backend import Backend
from cvkernels.ops.common import aliasing, native, norm
from cvkernels.ops.common.arguments import check_apart, check_bn, check_tensors, integer
from cvkernels.ops.common.autograd import mark_written, needs_grad
from cvkernels.ops.common.dispatch import Call, Implementation, Table, call_of, reference
from cvkernels.ops.common.norm import BatchNormParams
from cvkernels.ops.common.plan import Plan, PlanTable, plan_of, planned_by
from cvkernels.ops.common.traffic import Traffic, nbytes
from cvkernels.ops.dense_concat.reference import appended

OP = "dense_concat"
DTYPES = native.DTYPES["cpu"]

library = torch.library.Library("cvkernels", "FRAGMENT")
library.define(
    f"dense_concat(Tensor(a!) buffer, Tensor src, int start, {norm.ARGUMENTS}, bool relu) -> ()"
)
_dense_concat = torch.ops.cvkernels.dense_concat.default
_plans = PlanTable()
run_kept, is_traced = native.keeps_calls(2), native.is_traced


def plan(
    buffer_like: Tensor,
    src_like: Tensor,
    start: int,
    bn: BatchNormParams | None = None,
    relu: bool = False,
    *,
    backend: Backend = "auto",
    once: bool = False,
) -> Plan:
    """A call of :func:`dense_concat`, as ``plan(buffer, src)``; the tensors are examples.

    It holds bn's vectors as they are now.
    """
    check_tensors(OP, buffer=buffer_like, src=src_like)
    start = integer(OP, "start", start)
    _check(buffer_like, src_like, start, bn)
    call = call_of(buffer_like, (), TABLE, backend, once)
    moved = nbytes(src_like)
    read = moved + nbytes(*(bn or ())[:4])
    planned = plan_of(
        TABLE, None, call, (src_like, start, bn, bool(relu)), lambda _: Traffic(1, read, moved)
    )
    return planned.expecting(call, (bn,), buffer=buffer_like, src=src_like)


@planned_by(plan)
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
    if not is_traced():
        if (written := run_kept(buffer, src, start, bn, relu, backend)) is not None:
            return written
    if torch.compiler.is_compiling():
        return plan(buffer, src, start, bn, relu, backend=backend, once=True).run(buffer, src)
    key = None
    if bn is None and type(start) is int:
        key = _plans.key(backend, (buffer, src), start, relu)
    if (planned := _plans.get(key)) is None:
        planned = plan(buffer, src, start, bn, relu, backend=backend, once=key is None)
        _plans.keep(key, planned, buffer, src)
        if key is not None:
            native.keep_call(run_kept, planned, start, None, relu, backend)
    _check_overlap(buffer, src, bn, start)
    return planned.recorded(buffer, src)


backends.answers(OP, plan)


def _plan_native(
    problem: None, call: Call, src: Tensor, start: int, bn: BatchNormParams | None, relu: bool
) -> Callable[[Tensor, Tensor], Tensor]:
    vectors = norm.vectors_of(bn, src) or norm.NO_VECTORS

    def run(buffer, src):
        mark_written(buffer)
        _dense_concat(buffer, src, start, *vectors, relu)
        return buffer

    if not native.directs(call) or not src.numel():
        return run
    buffer = call.x
    work = native.direct(lambda: _dense_concat(buffer, src, start, *vectors, relu))
    held = [0 if v is None else v.data_ptr() for v in vectors[:4]]

    def run_directly(buffer, src):
        mark_written(buffer)
        work(buffer.data_ptr(), src.data_ptr(), *held)
        return buffer

    run_directly.held = vectors  # type: ignore[attr-defined]  # the memory at their addresses
    recipe = native.recipe(work, (buffer, src), (), (buffer,))
    run_directly.recipe = recipe  # type: ignore[attr-defined]
    return run_directly


def _plan_reference(
    problem: None, call: Call, src: Tensor, start: int, bn: BatchNormParams | None, relu: bool
) -> Callable[[Tensor, Tensor], Tensor]:
    stop, vectors = start + src.shape[1], norm.vectors_of(bn, src)

    def run(buffer, src):
        buffer[:, start:stop].copy_(appended(src, vectors, relu))
        return buffer

    return run


TABLE = Table(
    OP,
    Implementation(
        "native", lambda problem, call: native.lacks(OP, call), _plan_native, native.compiled_for
    ),
    reference(_plan_reference),
)


native.writes(library, OP)


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
    check_apart(OP, "buffer", buffer)
    if bn is not None:
        check_bn("dense_concat", "bn", bn, src.shape[1], src)
    if needs_grad(buffer, src, bn):
        raise ValueError(
            "dense_concat: buffer, src and bn must not require a gradient, and one of them does; "
            "call it under torch.no_grad(), or use torch.cat"
        )


def _check_overlap(buffer: Tensor, src: Tensor, bn: BatchNormParams | None, start: int) -> None:
    C = src.shape[1]
    for name, t in (("src", src), *(() if bn is None else zip(bn._fields[:4], bn, strict=False))):
        if t is None or not aliasing.one_storage(buffer, t):
            continue
        if aliasing.overlap(t, buffer[:, start : start + C]):
            raise ValueError(
                f"dense_concat: {name if t is src else f'bn.{name}'} overlaps the channels "
                f"[{start}, {start + C}) of the buffer that src is written to; write into other "
                f"channels, or from another tensor"
            )
