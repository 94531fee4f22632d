"""Squeeze-and-excitation in plain PyTorch: the specification, and the fallback everywhere.

The gradients are in float32 or wider. With s = sigmoid(gate), z = x * s + residual, out = act(z)
and dz = act'(z) * grad:

    dx = dz * s        d gate = s * (1 - s) * sum_hw dz * x        d residual = dz

and through the block, with d mean from the two layers, dx = dz * s + d mean / HW.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cvkernels.ops.common.activation import activate, activation_backward
from cvkernels.ops.common.differentiable import needs_stock
from cvkernels.ops.common.norm import accumulator


def squeeze_reference(x: Tensor) -> Tensor:
    return x.mean((2, 3))


def excite_reference(
    pooled: Tensor,
    weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None,
    act: str = "relu", *, sigmoid: bool = False, count: int | None = None,
) -> Tensor:  # fmt: skip
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
    weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None,
    act: str = "relu", residual: Tensor | None = None, out_act: str = "none",
) -> Tensor:  # fmt: skip
    logits = excite_reference(squeeze_reference(x), weight1, bias1, weight2, bias2, act)
    return se_scale_reference(x, logits, residual, out_act)


def se_scale_backward(
    grad: Tensor, x: Tensor, gate: Tensor, residual: Tensor | None, out: Tensor | None, act: str,
    input_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(d x where it is wanted, d gate, d residual unless it is grad); what is not made is empty."""
    dtype = accumulator(x.dtype)
    scale = torch.sigmoid(gate.to(dtype))[:, :, None, None]
    z = None
    if act == "silu":
        z = x * scale if residual is None else x * scale + residual
    dz = activation_backward(grad, act, out, z)
    s = scale[:, :, 0, 0]
    d_gate = (dz * x.to(dtype)).sum((2, 3)) * (s * (1 - s))
    dx = (dz * scale).to(x.dtype) if input_grad else x.new_empty(0)
    return dx, d_gate.to(gate.dtype), x.new_empty(0) if act == "none" else dz.to(x.dtype)


def excite_backward(
    grad: Tensor, mean: Tensor,
    weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None,
    act: str,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None]:  # fmt: skip
    """(d mean, d weight1, d bias1, d weight2, d bias2), d mean in the accumulator's dtype.

    The products are small: [N, C] with [C, R], by PyTorch's own matrix product.
    """
    dtype = accumulator(weight1.dtype)
    grad, mean = grad.to(dtype), mean.to(dtype)
    first, second = (weight.flatten(1).to(dtype) for weight in (weight1, weight2))
    z = mean @ first.T
    if bias1 is not None:
        z = z + bias1.to(dtype)
    hidden = torch.relu(z) if act == "relu" else z * torch.sigmoid(z)
    dz = activation_backward(grad @ second, act, hidden, z)
    return (
        dz @ first,
        (dz.T @ mean).to(weight1.dtype).view(weight1.shape),
        None if bias1 is None else dz.sum(0).to(bias1.dtype),
        (grad.T @ hidden).to(weight2.dtype).view(weight2.shape),
        None if bias2 is None else grad.sum(0).to(bias2.dtype),
    )


def squeeze_excite_backward(
    grad: Tensor, x: Tensor, layers: tuple[Tensor, Tensor | None, Tensor, Tensor | None],
    mean: Tensor, gate: Tensor, residual: Tensor | None, out: Tensor | None,
    act: str, out_act: str, input_grad: bool, backend: str = "auto",
) -> tuple[Tensor | None, tuple[Tensor | None, ...], Tensor]:  # fmt: skip
    """(d x where it is wanted, those of the layers' tensors, d residual)."""
    ops, pixels = torch.ops.cvkernels, x.shape[2] * x.shape[3]
    if needs_stock(grad):
        mean = x.mean((2, 3), dtype=accumulator(x.dtype))
        gate = excite_reference(mean, *layers, act)
        _, d_gate, dz = se_scale_backward(grad, x, gate, residual, out, out_act, False)
        d_mean, *d_layers = excite_backward(d_gate, mean, *layers, act)
        dz = grad if out_act == "none" else dz
        dx = dz * torch.sigmoid(gate)[:, :, None, None] + (d_mean / pixels)[:, :, None, None]
        return dx.to(x.dtype) if input_grad else None, tuple(d_layers), dz
    _, d_gate, dz = ops.se_scale_backward(grad, x, gate, residual, out, out_act, False, backend)
    dz = grad if out_act == "none" else dz
    d_mean, *d_layers = excite_backward(d_gate, mean, *layers, act)
    if not input_grad:
        return None, tuple(d_layers), dz
    dx = ops.se_scale_shifted(dz.to(x.dtype), gate, d_mean / pixels, backend)
    return dx, tuple(d_layers), dz
