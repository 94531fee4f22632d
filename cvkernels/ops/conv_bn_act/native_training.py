"""The compiled convolution in training, on the CPU: weights that each step moves, and gradients.

The gradient in x is a convolution of grad, with the weight's channels exchanged and its taps
reversed; the gradient in the weight sums products of pixels of x and grad, for a 3x3 convolution at
Winograd's points (csrc/conv_bn_act/winograd.h): its forward pass is linear in the weight, and this
is the transpose of it.

Maps are float32[N, C, H, W], channels_last or channel slices of such, results channels_last;
weights are float32[K, C, R, S], the gradient in one as it lies in memory. All of stride 1.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cvkernels import extension
from cvkernels.ops.common import recycled
from cvkernels.ops.common.activation import code
from cvkernels.ops.common.layout import is_pixel_matrix
from cvkernels.ops.common.recycled import new_map
from cvkernels.ops.conv_bn_act import native

# oneDNN is faster than Winograd's tiles for fewer pixels, which do not pay for transforming the
# weight; and than a product for more in a map, unless there are few channels or the map is so large
# that oneDNN's result lies in fresh memory.
PIXELS = 1 << 10
SMALL_MAP = 14 * 14
FEW_CHANNELS = 32
_WINOGRAD = max(native.WINOGRAD)


def algorithm_of(x: Tensor, weight: Tensor, padding: tuple[int, int]) -> int | None:
    """How the convolution of stride 1 is computed fastest; None where oneDNN does it."""
    if not (x.is_cpu and x.dtype == weight.dtype == torch.float32 and extension.has("cpu")):
        return None
    N, C, H, W = x.shape
    channels = min(C, weight.shape[0])
    if weight.shape[2:] == (1, 1) and padding == (0, 0):
        largest = x.element_size() * N * H * W * max(C, weight.shape[0])
        small = H * W <= SMALL_MAP or channels < FEW_CHANNELS
        return native.DIRECT if small or largest >= recycled.MAPPED else None
    if weight.shape[2:] != (3, 3) or max(padding) > 2 or channels < native.PANEL:
        return None
    height, width = H + 2 * padding[0] - 2, W + 2 * padding[1] - 2
    return _WINOGRAD if min(height, width) > 0 and N * height * width >= PIXELS else None


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, padding: tuple[int, int], algorithm: int
) -> Tensor:
    """``conv2d(x, weight, bias, padding=padding)``."""
    return _convolve(x, weight, bias, padding, algorithm, reversed=False)


def input_gradient(
    grad: Tensor, weight: Tensor, padding: tuple[int, int], algorithm: int
) -> Tensor:
    """The gradient in x."""
    last = weight.shape[2] - 1
    around = last - padding[0], last - padding[1]
    return _convolve(grad, weight.transpose(0, 1), None, around, algorithm, reversed=True)


def _convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, padding: tuple[int, int], algorithm: int,
    reversed: bool,
) -> Tensor:  # fmt: skip
    K, _, *kernel = weight.shape
    if algorithm in native.WINOGRAD:
        packed = recycled.empty(native.shape_at_points(weight, algorithm), weight.dtype)
        native.to_points(weight, reversed, algorithm, packed)
    else:
        packed = native.pack(weight, algorithm)
    past = -K % native.PANEL
    shift = packed.new_zeros(K + past) if bias is None else F.pad(bias.float(), (0, past))
    size = (n + 2 * pad - k + 1 for n, pad, k in zip(x.shape[2:], padding, kernel, strict=True))
    y = new_map(x, (x.shape[0], K, *size))
    options = (*kernel, 1, 1, *padding, 1, 1, code("none"), algorithm)
    native.convolution(x, packed, shift, y, None, None, None, None, *options)
    return y


def weight_gradient(
    grad: Tensor, x: Tensor, weight: Tensor, padding: tuple[int, int], algorithm: int
) -> Tensor | None:
    """The gradient in weight; None where oneDNN has to compute it."""
    if algorithm == native.DIRECT:
        whole = x.shape[1] % native.PANEL == 0 and weight.is_contiguous()
        if not (whole and is_pixel_matrix(x)):
            return None
    out = torch.empty_like(weight)
    native.weight_gradient(grad, x, *padding, algorithm, out)
    return out
