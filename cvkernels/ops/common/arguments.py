"""Checks of single arguments, shared by the ops; each error names the op and the argument."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cvkernels.ops.common import aliasing
from cvkernels.ops.common.errors import InputValueError
from cvkernels.ops.common.layout import overlaps_itself
from cvkernels.ops.common.norm import BatchNormParams

LARGEST = 2**31 - 1  # of an option: what is computed from two of them fits 64 bits


def check_tensors(op: str, optional: Mapping[str, Any] | None = None, **required: Any) -> None:
    """That the required arguments are dense tensors, and so are the optional ones that are there.

    Asked first: all other checks look at the arguments' attributes.
    """
    given = {name: t for name, t in (optional or {}).items() if t is not None}
    for name, t in (required | given).items():
        if not isinstance(t, Tensor):
            raise TypeError(f"{op}: {name} must be a Tensor, got {type(t).__name__}")
        _check_dense(op, name, t)


def _check_dense(op: str, name: str, t: Tensor) -> None:
    if t.layout is not torch.strided:
        raise TypeError(
            f"{op}: {name} must be a dense tensor, got the layout {t.layout}; convert it with "
            f".to_dense()"
        )
    if not torch.compiler.is_compiling() and t.is_neg():  # kernels read the memory
        raise ValueError(
            f"{op}: {name} must not be a view that negates as it is read; copy it with "
            f".resolve_neg()"
        )


def integer(op: str, name: str, value: Any) -> int:
    """value as an int, where it is one or stands for one, such as NumPy's integers."""
    try:
        if isinstance(value, bool):
            raise TypeError
        found = operator.index(value)
    except TypeError:
        raise TypeError(f"{op}: {name} must be an integer, got {value!r}") from None
    if abs(found) > LARGEST:
        raise ValueError(f"{op}: {name} must be less than 2**31, got {value!r}")
    return found


def pair(op: str, name: str, value: int | tuple[int, int]) -> tuple[int, int]:
    values = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(values) == 2:
        with contextlib.suppress(TypeError):
            return integer(op, name, values[0]), integer(op, name, values[1])
    way_out = "; padding='same' has no fused form" if isinstance(value, str) else ""
    raise ValueError(f"{op}: {name} must be an int or two, got {value!r}{way_out}")


def check_number(op: str, name: str, value: Any) -> None:
    if not isinstance(value, (int, float)):
        raise TypeError(f"{op}: {name} must be a number, got {value!r}")


def check_size(op: str, result: str, elements: int, dtype: torch.dtype) -> None:
    """That the result's bytes can be counted in 64 bits."""
    if elements * dtype.itemsize > 2**63 - 1:
        raise InputValueError(
            f"{op}: {result} would have {elements} elements, more than any memory holds"
        )


def check_device(op: str, name: str, tensor: Tensor, x: Tensor) -> None:
    if tensor.device != x.device:
        raise InputValueError(
            f"{op}: {name} must be on x's device {x.device}, got {tensor.device}; "
            f"move it with .to(x.device)"
        )


def check_tensor(op: str, name: str, tensor: Tensor, shape: tuple, letters: str, x: Tensor) -> None:
    check_tensors(op, None, **{name: tensor})
    if tuple(tensor.shape) != shape:
        raise ValueError(
            f"{op}: {name} must have shape {letters} = {list(shape)}, got {list(tensor.shape)}"
        )
    if not tensor.is_floating_point():
        raise TypeError(f"{op}: {name} must have a floating dtype, got {tensor.dtype}")
    check_device(op, name, tensor, x)


def check_residual(op: str, residual: Tensor, x: Tensor) -> None:
    check_tensors(op, residual=residual)
    if residual.shape != x.shape:
        raise ValueError(
            f"{op}: residual must have x's shape, {list(x.shape)}, got {list(residual.shape)}"
        )
    if residual.dtype != x.dtype:
        raise TypeError(
            f"{op}: residual must have x's dtype, {x.dtype}, got {residual.dtype}; "
            f"convert it with .to(x.dtype)"
        )
    check_device(op, "residual", residual, x)


def check_vector(op: str, name: str, vector: Tensor, channels: int, x: Tensor) -> None:
    check_tensors(op, None, **{name: vector})
    if vector.shape != (channels,):
        raise ValueError(f"{op}: {name} must have shape [{channels}], got {list(vector.shape)}")
    if not vector.is_floating_point():
        raise TypeError(f"{op}: {name} must have a floating dtype, got {vector.dtype}")
    if vector.device != x.device:
        check_device(op, name, vector, x)


def check_bn(op: str, name: str, bn: BatchNormParams, channels: int, x: Tensor) -> None:
    if not isinstance(bn, BatchNormParams):
        raise TypeError(
            f"{op}: {name} must be BatchNormParams, got {type(bn).__name__}; "
            f"BatchNormParams.of(module) takes it from an nn.BatchNorm2d"
        )
    if (bn.mean is None) != (bn.var is None):
        raise ValueError(f"{op}: {name} must have both mean and var, or neither")
    if all(vector is None for vector in bn[:4]):
        raise ValueError(f"{op}: {name} has no vector; pass None, or a weight of ones")
    for part, vector in zip(("weight", "bias", "mean", "var"), bn[:4], strict=True):
        if vector is not None:
            check_vector(op, f"{name}.{part}", vector, channels, x)
    check_number(op, f"{name}.eps", bn.eps)


def check_act(op: str, name: str, act: str, allowed: Sequence[str]) -> None:
    if not isinstance(act, str) or act not in allowed:
        raise ValueError(f"{op}: {name} must be one of {list(allowed)}, got {act!r}")


def check_out(op: str, out: Tensor, x: Tensor, shape: tuple[int, ...], has: str = "shape") -> None:
    """out may have any strides that overlap nowhere; ``has`` is what its shape is called."""
    check_tensors(op, out=out)
    if out.shape != shape:
        raise ValueError(f"{op}: out must have {has} {list(shape)}, got {list(out.shape)}")
    if out.dtype != x.dtype:
        raise TypeError(f"{op}: out must have x's dtype, {x.dtype}, got {out.dtype}")
    if out.device != x.device:
        raise ValueError(f"{op}: out must be on x's device, {x.device}, got {out.device}")
    check_apart(op, "out", out)


def check_apart(op: str, name: str, written: Tensor) -> None:
    """That no two elements of what is written are one."""
    if overlaps_itself(written):
        raise ValueError(
            f"{op}: {name} must not overlap itself, got strides {list(written.stride())}; "
            f"write into a tensor that is not expanded"
        )


def check_not_differentiable(op: str, out: Tensor, grad: bool) -> None:
    """For a call with out=: that no gradient is needed."""
    if grad or (torch.is_grad_enabled() and out.requires_grad):
        raise ValueError(
            f"{op}: out= is not differentiable, and it or an argument requires a gradient; "
            f"call it under torch.no_grad(), or leave out= away"
        )


def check_overlap(
    op: str,
    out: Tensor,
    inputs: Mapping[str, Tensor | BatchNormParams | None],
    in_place: tuple[str, ...] = (),
) -> None:
    """out may be the very elements of an input named in ``in_place``, and else none of any's."""
    if torch.compiler.is_compiling():  # a traced tensor has no storage to ask about
        return
    for name, given in inputs.items():
        for tensor in given[:4] if isinstance(given, tuple) else (given,):
            if tensor is None or not aliasing.overlap(tensor, out):
                continue
            if name in in_place and aliasing.same_view(tensor, out):
                continue  # each element is read before it is written
            raise ValueError(_overlapping(op, out, name, tensor, in_place))


def _overlapping(op: str, out: Tensor, name: str, t: Tensor, in_place: tuple[str, ...]) -> str:
    way_out = f", or into exactly the elements of {' or '.join(in_place)}" if in_place else ""
    return (
        f"{op}: out overlaps {name}: elements would be read after they are written (out starts at "
        f"element {out.storage_offset()} with shape {list(out.shape)}, {name} at "
        f"{t.storage_offset()} with shape {list(t.shape)}, in one storage); write into other "
        f"channels or another tensor{way_out}"
    )
