"""The gradients of the compiled depthwise convolution, on the CPU.

That in x is a convolution of grad, spread out by the stride, with the taps reversed; that in the
weight sums products of x and grad by bands of rows. Maps are float32[N, C, H, W], channels_last;
weights are float32[C, 1, K, K].
"""

from __future__ import annotations

import torch
from torch import Tensor

from cvkernels.ops.common import recycled
from cvkernels.ops.common.activation import code
from cvkernels.ops.common.layout import channels_last
from cvkernels.ops.common.recycled import new_map
from cvkernels.ops.depthwise_conv_bn_act import native


def suits(
    x: Tensor, weight: Tensor, stride: tuple[int, int], padding: tuple[int, int],
    dilation: tuple[int, int], groups: int,
) -> bool:  # fmt: skip
    """Whether the gradients of the convolution can be computed here."""
    kernel = (weight.shape[2], weight.shape[3])
    return (
        x.is_cpu
        and x.dtype == weight.dtype == torch.float32
        and groups == x.shape[1] == weight.shape[0] > 1
        and max(padding) < kernel[0]
        and not native.lacks(x.dtype, kernel, stride, dilation)
    )


def is_faster_in_input(x: Tensor, weight: Tensor, stride: tuple[int, int]) -> bool:
    """Whether :func:`input_gradient` is faster than oneDNN's.

    Of a stride it multiplies zeros, too, and is so only where oneDNN's result is in fresh memory.
    """
    if stride != (1, 1):
        return x.nbytes >= recycled.MAPPED
    return weight.shape[2] == 5 or x.nbytes >= recycled.BYTES


def is_faster_in_weight(weight: Tensor) -> bool:
    """Whether :func:`weight_gradient` is faster than oneDNN's, which for 5x5 is a slow one."""
    return weight.shape[2] == 5


def input_gradient(
    grad: Tensor, x: Tensor, weight: Tensor, stride: tuple[int, int], padding: tuple[int, int]
) -> Tensor:
    """The gradient in x, of which the shape alone is read."""
    taps, affine = native.pack(weight.flip(2, 3), None, None)
    d_x, last = new_map(x), weight.shape[2] - 1
    around = (last - padding[0], last - padding[1])
    options = (weight.shape[2], 1, *around, stride[0], code("none"))
    native.convolve(grad, taps, affine, *options, d_x.permute(0, 2, 3, 1), None)
    return d_x


def weight_gradient(
    grad: Tensor, x: Tensor, weight: Tensor, stride: tuple[int, int], padding: tuple[int, int]
) -> Tensor:
    """The gradient in weight."""
    out = weight.new_empty(weight.shape)
    pixels = channels_last(grad).permute(0, 2, 3, 1)
    native.weight_gradient_of(pixels, x, weight.shape[2], stride[0], *padding, out)
    return out
