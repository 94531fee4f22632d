"""What conv_bn_act computes, in plain PyTorch: the specification, and the fallback everywhere.

Its gradients need x, weight and out alone. With z = conv(u, W) * scale + shift + residual,
out = act(z), dz the gradient in z, and dW_raw = conv_weight_grad(dz, u):

    du = conv_input_grad(dz, W * scale)         dW = dW_raw * scale
    dshift = sum_npq dz                         dscale = sum_crs W * dW_raw

dscale needs no convolution output: sum_npq dz * conv(u, W) is linear in W. One convolution_backward
gives du and dW_raw together.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cvkernels.ops.common.activation import activate, activation_backward
from cvkernels.ops.common.convolution import Pair, dilation_of
from cvkernels.ops.common.norm import BatchNormParams, accumulator, normalize, scale_shift
from cvkernels.ops.conv_bn_act.problem import Arguments


def conv_bn_act_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, bn: BatchNormParams | None = None,
    stride: Pair = 1, padding: Pair = 0, dilation: Pair = 1, groups: int = 1, act: str = "relu",
    residual: Tensor | None = None, input_bn: BatchNormParams | None = None,
    input_gate: Tensor | None = None, output_gate: Tensor | None = None,
) -> Tensor:  # fmt: skip
    if input_bn is not None:
        x = F.relu(normalize(x, input_bn))
    if input_gate is not None:
        x = (x * input_gate[:, :, None, None]).to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    dilation = dilation_of("conv_bn_act", weight.shape[2:], dilation)
    y = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    if bn is not None:
        y = normalize(y, bn)
    if output_gate is not None:
        y = y * output_gate[:, :, None, None].to(y.dtype)
    if residual is not None:
        y = y + residual
    return activate(y, act)


def prologue(
    x: Tensor, bn: BatchNormParams | None, gate: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Any, Any]:
    """u, and what its gradient needs: u before the gate, the norm's scale, and v > 0."""
    if bn is None:
        before_gate, scale, positive = x, None, None
    else:
        scale, shift = scale_shift(None, bn, x.transpose(0, 1), dtype)
        v = x * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)
        positive = v > 0
        before_gate = torch.relu(v).to(x.dtype)
    u = before_gate if gate is None else before_gate * gate[:, :, None, None].to(x.dtype)
    return u, before_gate, scale, positive


def prologue_backward(
    du: Tensor, x: Tensor, bn: BatchNormParams | None, gate: Tensor | None,
    before_gate: Tensor, scale: Any, positive: Any, dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """(dx, d weight and d bias of input_bn, d gate)."""
    d_gate = None
    if gate is not None:
        d_gate = (du * before_gate).sum((2, 3), dtype=dtype).to(gate.dtype)
        du = du * gate[:, :, None, None].to(du.dtype)
    if bn is None:
        return du, None, None, d_gate
    dv = du * positive
    d_shift = dv.sum((0, 2, 3), dtype=dtype)
    d_scale = (dv * x).sum((0, 2, 3), dtype=dtype)
    d_weight, d_bias = norm_backward(d_scale, d_shift, None, bn, dtype)
    return (dv * scale.view(-1, 1, 1)).to(x.dtype), d_weight, d_bias, d_gate


def norm_backward(
    d_scale: Tensor, d_shift: Tensor, bias: Tensor | None, bn: BatchNormParams, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients in bn's weight and bias from those in what :func:`scale_shift` gives."""
    d_weight = None
    if bn.weight is not None:
        inverse_std = 1.0 if bn.var is None else torch.rsqrt(bn.var.to(dtype) + bn.eps)
        offset = torch.zeros_like(d_shift) if bias is None else bias.to(dtype)
        offset = offset if bn.mean is None else offset - bn.mean.to(dtype)
        d_weight = (inverse_std * (d_scale + d_shift * offset)).to(bn.weight.dtype)
    return d_weight, None if bn.bias is None else d_shift.to(bn.bias.dtype)


def conv_bn_act_backward(
    grad: Tensor, arguments: Arguments, out: Tensor | None
) -> dict[str, Tensor | None]:
    """Gradients by argument name; relu and relu6 need ``out``, and silu the residual."""
    x, weight, bias, bn, stride, padding, dilation, groups, act, _, input_bn, gate = arguments[:12]
    bn = bn or BatchNormParams()
    dtype = accumulator(x.dtype)
    pre_activation = None
    if act == "silu":
        pre_activation = conv_bn_act_reference(*arguments._replace(act="none")[:12])
    dz = activation_backward(grad, act, out, pre_activation)
    scale, _ = scale_shift(bias, bn, weight, dtype)
    u, before_gate, input_scale, positive = prologue(x, input_bn, gate, dtype)
    folded = (weight.to(dtype) * scale.view(-1, 1, 1, 1)).to(weight.dtype)
    du, dw_raw, _ = torch.ops.aten.convolution_backward(
        dz, u, folded, None, stride, padding, dilation, False, [0, 0], groups, [True, True, False]
    )
    d_shift = dz.sum((0, 2, 3), dtype=dtype)
    d_scale = (weight.to(dtype) * dw_raw.to(dtype)).sum((1, 2, 3))
    dx, d_in_weight, d_in_bias, d_gate = prologue_backward(
        du, x, input_bn, gate, before_gate, input_scale, positive, dtype
    )
    d_weight, d_bias = norm_backward(d_scale, d_shift, bias, bn, dtype)
    return {
        "x": dx,
        "weight": (dw_raw.to(dtype) * scale.view(-1, 1, 1, 1)).to(weight.dtype),
        "residual": dz,
        "in_weight": d_in_weight,
        "in_bias": d_in_bias,
        "gate": d_gate,
        "bias": None if bias is None else (d_shift * scale).to(bias.dtype),
        "bn_weight": d_weight,
        "bn_bias": d_bias,
    }
