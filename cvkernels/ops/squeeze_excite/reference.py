"""Squeeze-and-excitation in plain PyTorch: the specification, and the fallback everywhere."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def activate(x: Tensor, act: str) -> Tensor:
    if act == "relu":
        return F.relu(x)
    if act == "silu":
        return F.silu(x)
    return x


def squeeze_reference(x: Tensor) -> Tensor:
    return x.mean((2, 3))


def excite_reference(
    pooled: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    act: str = "relu",
    *,
    sigmoid: bool = False,
    count: int | None = None,
) -> Tensor:
    dtype = pooled.dtype if count is None else weight1.dtype
    mean = pooled if count is None else pooled / count
    hidden = activate(F.linear(mean.to(weight1.dtype), weight1.flatten(1), bias1), act)
    logits = F.linear(hidden, weight2.flatten(1), bias2).to(dtype)
    return torch.sigmoid(logits) if sigmoid else logits


def se_scale_reference(
    x: Tensor, gate: Tensor, residual: Tensor | None = None, act: str = "none"
) -> Tensor:
    y = x * torch.sigmoid(gate).to(x.dtype)[:, :, None, None]
    if residual is not None:
        y = y + residual
    return activate(y, act)


def squeeze_excite_reference(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    act: str = "relu",
    residual: Tensor | None = None,
    out_act: str = "none",
) -> Tensor:
    logits = excite_reference(squeeze_reference(x), weight1, bias1, weight2, bias2, act)
    return se_scale_reference(x, logits, residual, out_act)
