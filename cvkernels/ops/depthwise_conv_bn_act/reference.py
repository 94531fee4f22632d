"""What depthwise_conv_bn_act computes, in plain PyTorch: the specification, and the fallback."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from cvkernels.ops.common.activation import activate
from cvkernels.ops.common.convolution import Pair, dilation_of
from cvkernels.ops.common.norm import BatchNormParams, accumulator, normalize


def depthwise_conv_bn_act_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, bn: BatchNormParams | None = None,
    stride: Pair = 1, padding: Pair = 0, dilation: Pair = 1, act: str = "none",
    squeeze: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    bias = None if bias is None else bias.to(x.dtype)
    dilation = dilation_of("depthwise_conv_bn_act", weight.shape[2:], dilation)
    y = F.conv2d(x, weight, bias, stride, padding, dilation, groups=x.shape[1])
    if bn is not None:
        y = normalize(y, bn)
    y = activate(y, act)
    return (y, y.sum((2, 3), dtype=accumulator(y.dtype))) if squeeze else y
