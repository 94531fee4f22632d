"""Checks of single arguments, shared by the ops; each error names the op and the argument."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from cvkernels.ops.common import aliasing
from cvkernels.ops.common.errors import InputValueError
from cvkernels.ops.common.layout import overlaps_itself
from cvkernels.ops.common.norm import BatchNormParams


def pair(op: str, name: str, value: int | tuple[int, int]) -> tuple[int, int]:
    if isinstance(value, int):
        return (value, value)
    pair = tuple(value) if isinstance(value, (tuple, list)) else ()
    if len(pair) != 2 or not all(isinstance(v, int) for v in pair):
        way_out = "; padding='same' has no fused form" if isinstance(value, str) else ""
        raise ValueError(f"{op}: {name} must be an int or two, got {value!r}{way_out}")
    return pair


def check_device(op: str, name: str, tensor: Tensor, x: Tensor) -> None:
    if tensor.device != x.device:
        raise InputValueError(
            f"{op}: {name} must be on x's device {x.device}, got {tensor.device}; "
            f"move it with .to(x.device)"
        )


def check_tensor(op: str, name: str, tensor: Tensor, shape: tuple, letters: str, x: Tensor) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(
            f"{op}: {name} must have shape {letters} = {list(shape)}, got {list(tensor.shape)}"
        )
    if not tensor.is_floating_point():
        raise TypeError(f"{op}: {name} must have a floating dtype, got {tensor.dtype}")
    check_device(op, name, tensor, x)


def check_residual(op: str, residual: Tensor, x: Tensor) -> None:
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


def check_act(op: str, name: str, act: str, allowed: tuple[str, ...]) -> None:
    if act not in allowed:
        raise ValueError(f"{op}: {name} must be one of {list(allowed)}, got {act!r}")


def check_out(op: str, out: Tensor, x: Tensor, shape: tuple[int, ...], has: str = "shape") -> None:
    """out may have any strides that overlap nowhere; ``has`` is what its shape is called."""
    if out.shape != shape:
        raise ValueError(f"{op}: out must have {has} {list(shape)}, got {list(out.shape)}")
    if out.dtype != x.dtype:
        raise TypeError(f"{op}: out must have x's dtype, {x.dtype}, got {out.dtype}")
    if out.device != x.device:
        raise ValueError(f"{op}: out must be on x's device, {x.device}, got {out.device}")
    if overlaps_itself(out):
        raise ValueError(
            f"{op}: out must not overlap itself, got strides {list(out.stride())}; "
            f"write into a tensor that is not expanded"
        )


def check_not_differentiable(op: str, grad: bool) -> None:
    """For a call with out=: that no gradient is needed."""
    if grad:
        raise ValueError(
            f"{op}: out= is not differentiable, and an argument requires a gradient; "
            f"call it under torch.no_grad(), or leave out= away"
        )


def check_elementwise_overlap(op: str, out: Tensor, inputs: Mapping[str, Tensor | None]) -> None:
    """out may be the very elements of x or of residual, and else none of any input's."""
    if torch.compiler.is_compiling():  # a traced tensor has no storage to ask about
        return
    for name, tensor in inputs.items():
        if tensor is None or not aliasing.overlap(tensor, out):
            continue
        if name in ("x", "residual") and aliasing.same_view(tensor, out):
            continue  # each element is read before it is written
        raise ValueError(
            f"{op}: out overlaps {name}: elements would be read after they are written; "
            f"write into another tensor, or into exactly the elements of x or residual"
        )
