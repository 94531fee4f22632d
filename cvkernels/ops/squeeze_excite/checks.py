"""Argument checks of se_scale and its parts, before anything is allocated or launched."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
ACTS = ("relu", "silu")
OUT_ACTS = ("none", "relu", "silu")


def check_map(op: str, x: Tensor) -> None:
    if x.dim() != 4:
        raise ValueError(
            f"{op}: x must have shape [N, C, H, W], got {list(x.shape)}; "
            f"give a single image a batch of one with x[None]"
        )
    if x.dtype not in DTYPES:
        raise TypeError(
            f"{op}: x must be float32, float16, bfloat16 or float64, got {x.dtype}; "
            f"convert it with .to(torch.float32)"
        )
    _, C, H, W = x.shape
    if C == 0 or H == 0 or W == 0:
        raise ValueError(
            f"{op}: x must have channels and pixels, got {list(x.shape)}: "
            f"the mean of no pixel is not defined"
        )


def check_act(op: str, name: str, act: str, allowed: tuple[str, ...]) -> None:
    if act not in allowed:
        raise ValueError(f"{op}: {name} must be one of {list(allowed)}, got {act!r}")


def check_gate(op: str, gate: Tensor, x: Tensor) -> None:
    if gate.shape != x.shape[:2]:
        raise ValueError(
            f"{op}: gate must have shape [N, C] = {list(x.shape[:2])} to match x "
            f"{list(x.shape)}, got {list(gate.shape)}; squeeze the trailing 1x1 of a conv gate "
            f"with gate.flatten(1)"
        )
    if gate.dtype != x.dtype and (gate.dtype != torch.float32 or x.dtype == torch.float64):
        raise TypeError(
            f"{op}: gate must have x's dtype, {x.dtype}, or float32, got {gate.dtype}; "
            f"convert it with .to(x.dtype)"
        )
    _check_device(op, "gate", gate, x)


def check_layers(
    op: str,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    C: int,
    like: Tensor,
    dtypes: tuple[torch.dtype, ...],
) -> None:
    """The two layers from C channels to R and back, on like's device, all in one of ``dtypes``."""
    R, dtype, device = weight1.shape[0], weight1.dtype, like.device
    if (
        R > 0
        and dtype in dtypes
        and weight1.shape in ((R, C), (R, C, 1, 1))
        and weight2.shape in ((C, R), (C, R, 1, 1))
        and weight1.device == device
        and (weight2.dtype, weight2.device) == (dtype, device)
        and (bias1 is None or (bias1.shape, bias1.dtype, bias1.device) == ((R,), dtype, device))
        and (bias2 is None or (bias2.shape, bias2.dtype, bias2.device) == ((C,), dtype, device))
    ):
        return
    for name, weight in (("weight1", weight1), ("weight2", weight2)):
        if weight.dim() not in (2, 4) or weight.shape[2:].numel() != 1:
            raise ValueError(
                f"{op}: {name} must be a matrix or the weight of a 1x1 convolution, "
                f"got shape {list(weight.shape)}"
            )
    for name, tensor, shape in (
        ("weight1", weight1, (R, C)),
        ("bias1", bias1, (R,)),
        ("weight2", weight2, (C, R)),
        ("bias2", bias2, (C,)),
    ):
        if tensor is None:
            continue
        if tuple(tensor.shape[:2]) != shape or R == 0:
            letters = {"weight1": "[R, C]", "bias1": "[R]", "weight2": "[C, R]", "bias2": "[C]"}
            raise ValueError(
                f"{op}: {name} must have shape {letters[name]} = {list(shape)} with R > 0 and "
                f"C = {C}, got {list(tensor.shape)}"
            )
        if tensor.dtype != weight1.dtype:
            raise TypeError(
                f"{op}: {name} must have weight1's dtype, {weight1.dtype}, got {tensor.dtype}"
            )
        _check_device(op, name, tensor, like)
    if weight1.dtype not in dtypes:
        raise TypeError(
            f"{op}: weights and biases must be {' or '.join(map(str, dtypes))}, "
            f"got {weight1.dtype}; convert them with .to()"
        )


def parameter_dtypes(dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    """What weights may be beside maps of ``dtype``: the same, or float32 for the half dtypes."""
    return (dtype,) if dtype.itemsize >= 4 else (dtype, torch.float32)


def check_pooled(op: str, pooled: Tensor, count: int | None) -> None:
    if pooled.dim() != 2 or pooled.shape[1] == 0:
        raise ValueError(
            f"{op}: pooled must have shape [N, C], got {list(pooled.shape)}; "
            f"flatten a pooled map of 1x1 pixels with pooled.flatten(1)"
        )
    if pooled.dtype not in DTYPES:
        raise TypeError(
            f"{op}: pooled must be float32, float16, bfloat16 or float64, got {pooled.dtype}"
        )
    if count is None:
        return
    if not isinstance(count, int) or count < 1:
        raise ValueError(f"{op}: count must be a positive number of pixels, got {count!r}")
    if pooled.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"{op}: with count=, pooled holds sums and must be float32 or float64, got "
            f"{pooled.dtype}: the sum of a map does not fit a half dtype"
        )


def _check_device(op: str, name: str, tensor: Tensor, like: Tensor) -> None:
    if tensor.device != like.device:
        raise ValueError(
            f"{op}: {name} must be on the input's device, {like.device}, got {tensor.device}; "
            f"move it with .to()"
        )
