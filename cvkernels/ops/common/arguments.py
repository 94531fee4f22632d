"""Checks of single arguments, shared by the ops; each error names the op and the argument."""

from __future__ import annotations

from torch import Tensor

from cvkernels.ops.common.errors import InputValueError
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
    if vector.dim() != 1 or vector.shape[0] != channels:
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
    for part, vector in zip(("weight", "bias", "mean", "var"), bn[:4], strict=True):
        if vector is not None:
            check_vector(op, f"{name}.{part}", vector, channels, x)
