"""What conv_bn_act computes, in plain PyTorch: the specification, and the fallback everywhere."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from cvkernels.ops.common.activation import activate
from cvkernels.ops.common.norm import BatchNormParams, normalize


def conv_bn_act_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    bn: BatchNormParams | None = None,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    act: str = "relu",
    residual: Tensor | None = None,
    input_bn: BatchNormParams | None = None,
    input_gate: Tensor | None = None,
) -> Tensor:
    if input_bn is not None:
        x = F.relu(normalize(x, input_bn))
    if input_gate is not None:
        x = x * input_gate[:, :, None, None]
    y = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    if bn is not None:
        y = normalize(y, bn)
    if residual is not None:
        y = y + residual
    return activate(y, act)
