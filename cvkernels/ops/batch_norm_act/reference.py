"""What batch_norm_act and its passes compute, in plain PyTorch: the specification."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cvkernels.ops.common.norm import BatchNormParams, vectors_of

ACTS = {"none": lambda z: z, "relu": F.relu, "silu": F.silu}


def batch_norm_act_reference(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float = 1e-5,
    act: str = "none",
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``act(batch_norm(x) + residual)`` with the batch's mean and variance, and these two."""
    mean, var = statistics_reference(x)
    weight, bias = vectors_of(BatchNormParams(weight, bias), x)[:2]
    z = F.batch_norm(x, None, None, weight, bias, training=True, eps=eps)
    return ACTS[act](z if residual is None else z + residual), mean, var


def wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def statistics_reference(x: Tensor) -> tuple[Tensor, Tensor]:
    var, mean = torch.var_mean(wide(x), (0, 2, 3), correction=0)
    return mean, var


def rows_of(
    mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, ...]:
    """The four vectors, those that are absent as ones and zeros."""
    weight = torch.ones_like(mean) if weight is None else weight
    return mean, var, weight, torch.zeros_like(mean) if bias is None else bias


def normalized_reference(x: Tensor, bn: BatchNormParams) -> Tensor:
    """``(x - mean) * scale + bias`` in the dtype that x is computed in."""
    assert bn.mean is not None
    y = (wide(x) - column(bn.mean)) * column(scale_of(bn))
    return y if bn.bias is None else y + column(wide(bn.bias))


def apply_reference(
    x: Tensor, bn: BatchNormParams, act: str, residual: Tensor | None = None
) -> Tensor:
    z = normalized_reference(x, bn)
    return ACTS[act](z if residual is None else z + wide(residual)).to(x.dtype)


def reduce_reference(
    grad: Tensor, x: Tensor, bn: BatchNormParams, act: str, output: Tensor | None = None
) -> tuple[Tensor, ...]:
    """(dy, what is added to the total, d_weight, d_bias, slope, offset)."""
    assert bn.mean is not None and bn.var is not None
    dy = _before_act(grad, normalized_reference(x, bn) if output is None else wide(output), act)
    scale, inverse_std = scale_of(bn), torch.rsqrt(bn.var + bn.eps)
    pixels = x.numel() // x.shape[1]
    d_bias = dy.sum((0, 2, 3))
    d_weight = (dy * (wide(x) - column(bn.mean))).sum((0, 2, 3)) * inverse_std
    slope, offset = -scale * inverse_std * d_weight / pixels, -scale * d_bias / pixels
    return dy, dy * column(scale), d_weight, d_bias, slope, offset


def finish_reference(
    grad: Tensor, x: Tensor, bn: BatchNormParams, act: str, slope: Tensor, offset: Tensor
) -> Tensor:
    """dx, in the dtype that x is computed in."""
    assert bn.mean is not None
    dy = _before_act(grad, normalized_reference(x, bn), act)
    return dy * column(scale_of(bn)) + through_statistics_reference(x, bn.mean, slope, offset)


def through_statistics_reference(x: Tensor, mean: Tensor, slope: Tensor, offset: Tensor) -> Tensor:
    return (wide(x) - column(mean)) * column(slope) + column(offset)


def scale_of(bn: BatchNormParams) -> Tensor:
    assert bn.mean is not None
    scale = torch.ones_like(bn.mean) if bn.weight is None else wide(bn.weight)
    return scale if bn.var is None else scale * torch.rsqrt(bn.var + bn.eps)


def _before_act(grad: Tensor, z: Tensor, act: str) -> Tensor:
    """The gradient in z, from that in ``act(z)``."""
    grad = wide(grad)
    if act == "relu":
        return torch.where(z <= 0, torch.zeros_like(grad), grad)
    if act == "none":
        return grad
    sigmoid = torch.sigmoid(z)
    return grad * sigmoid * (1 + z * (1 - sigmoid))


def column(vector: Tensor) -> Tensor:
    return vector[:, None, None]
