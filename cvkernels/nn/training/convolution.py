"""Convolution and its gradients, as functions of tensors."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cvkernels.ops.common.layout import channels_last
from cvkernels.ops.conv_bn_act import native_training
from cvkernels.ops.depthwise_conv_bn_act import native_training as depthwise


class Geometry(NamedTuple):
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int

    @classmethod
    def of(cls, conv: nn.Conv2d) -> Geometry:
        return cls(conv.stride, conv.padding, conv.dilation, conv.groups)


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """The convolution of a channels_last x, in x's dtype; channels_last."""
    if (algorithm := _algorithm_of(x, weight, geometry)) is not None:
        return native_training.convolve(x, weight, bias, geometry.padding, algorithm)
    bias = None if bias is None else bias.to(x.dtype)
    return channels_last(F.conv2d(x, weight.to(x.dtype), bias, *geometry))


def convolution_backward(
    grad: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, needed: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients in x, weight and bias, those of the three needed."""
    d_x = d_weight = None
    stride, padding, dilation, groups = geometry
    if not needed[2] and (algorithm := _algorithm_of(x, weight, geometry)) is not None:
        if needed[0]:
            d_x = native_training.input_gradient(grad, weight, padding, algorithm)
        if needed[1]:
            d_weight = native_training.weight_gradient(grad, x, weight, padding, algorithm)
    elif not needed[2] and groups > 1 and depthwise.suits(x, weight, *geometry):
        if needed[0] and depthwise.is_faster_in_input(x, weight, stride):
            d_x = depthwise.input_gradient(grad, x, weight, stride, padding)
        if needed[1] and depthwise.is_faster_in_weight(weight):
            d_weight = depthwise.weight_gradient(grad, x, weight, stride, padding)
    left = [needed[0] and d_x is None, needed[1] and d_weight is None, needed[2]]
    if not any(left):
        return d_x, d_weight, None
    bias_sizes = [weight.shape[0]] if needed[2] else None
    others = torch.ops.aten.convolution_backward(
        grad, x, weight.to(x.dtype), bias_sizes, stride, padding, dilation, False, [0, 0], groups,
        left,
    )  # fmt: skip
    return others[0] if d_x is None else d_x, others[1] if d_weight is None else d_weight, others[2]


def _algorithm_of(x: Tensor, weight: Tensor, geometry: Geometry) -> int | None:
    """How the compiled convolution computes it; None where it does not."""
    stride, padding, dilation, groups = geometry
    if stride != (1, 1) or dilation != (1, 1) or groups != 1:
        return None
    return native_training.algorithm_of(x, weight, padding)
