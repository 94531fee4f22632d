"""The depthwise convolution of bytes: csrc/depthwise_conv_bn_act/cpu.cpp, and by PyTorch.

Products and sums are of whole numbers below 2^24, so that float32 computes them exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cvkernels import extension
from cvkernels.ops.common import native
from cvkernels.ops.common.activation import activate, code
from cvkernels.ops.depthwise_conv_bn_act.native import BLOCK, pack
from cvkernels.ops.quantised.quantisation import LEVELS, Quantisation

OP = "depthwise_conv_bn_act_quantised"

library = torch.library.Library("cvkernels", "FRAGMENT")
library.define(
    f"{OP}(Tensor x, Tensor weight, Tensor affine, int kernel, int stride, int padding_h, "
    "int padding_w, int act, int x_zero, float out_scale, int out_zero, Tensor(a!) out, "
    "Tensor(b!)? sums, Tensor? quads) -> ()"
)
extension.load()
native.writes(library, OP)


def lacks(kernel: tuple[int, int], stride: tuple, dilation: tuple) -> str:
    """Why there is no such convolution of bytes; empty where there is one."""
    known = kernel in ((3, 3), (5, 5)) and stride in ((1, 1), (2, 2)) and dilation == (1, 1)
    return "" if known else "depthwise in int8 has 3x3 and 5x5 kernels of stride 1 and 2"


@dataclass(frozen=True, eq=False)
class Depthwise:
    """``act(conv(x) * weight_scale + bias)`` of a quantised x, one filter for each channel.

    Attributes:
        weight: int8[C, 1, K, K], between -127 and 127.
        weight_scale, bias: float32[C].
        act: "none", "relu", "relu6" or "silu".
        x, out: how these are quantised.
    """

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor
    stride: tuple[int, int]
    padding: tuple[int, int]
    act: str
    x: Quantisation
    out: Quantisation


def convolve(conv: Depthwise) -> Callable[..., Tensor]:
    """A function of (x, out, sums=None), which writes out, and sums if given.

    x is uint8[N, C, H, W], out uint8[N, C, P, Q], channels_last and dense; sums float32[N, C] are
    those of the result over its pixels, before it is rounded.
    """
    return _compiled(conv) if extension.has("cpu") else _reference(conv)


def _compiled(conv: Depthwise) -> Callable[..., Tensor]:
    run = getattr(torch.ops.cvkernels, OP).default
    taps, affine = pack(conv.weight.float(), None, None)
    channels = conv.weight_scale.shape[0]
    rows = affine.view(2, -1)
    rows[0, :channels] = conv.weight_scale * conv.x.scale
    rows[1, :channels] = conv.bias
    quads = pack_quads(conv.weight, conv.x.zero)
    geometry = (conv.weight.shape[2], conv.stride[0], *conv.padding, code(conv.act))
    options = (*geometry, conv.x.zero, 1.0 / conv.out.scale, conv.out.zero)

    def convolution(x: Tensor, out: Tensor, sums: Tensor | None = None) -> Tensor:
        run(x, taps, affine, *options, out.permute(0, 2, 3, 1), sums, quads)
        return out

    return convolution


def pack_quads(weight: Tensor, zero: int) -> Tensor:
    """weight[C, 1, K, K] as AVX512-VNNI takes it, see csrc/depthwise_conv_bn_act/quads.h; then for
    each channel ``-zero * sum(weight)`` in 32 bits. Given as floats of as many bits."""
    C, kernel = len(weight), weight.shape[2]
    rows = F.pad(weight.flatten(1, 2), (0, -kernel % 4, 0, 0, 0, -C % BLOCK))  # [C, K, 4 or 8]
    quads = rows.unflatten(2, (-1, 4))  # [C, K, T, 4]
    parts, start, whole = [], 0, len(rows)
    while start < whole:
        groups = next(g for g in (4, 2, 1) if g * BLOCK <= max(C - start, BLOCK))
        own = quads[start : start + groups * BLOCK].unflatten(0, (groups, 4, 4))
        # [i, j, k, K, T, 4], whose channels are 16 * i + 4 * j + k
        parts.append(own.permute(3, 4, 1, 0, 2, 5).flatten())
        start += groups * BLOCK
    sums = F.pad(-zero * weight.sum((1, 2, 3), dtype=torch.int32), (0, -C % BLOCK)).int()
    return torch.cat([*parts, sums.view(torch.int8)]).view(torch.float32)


def _reference(conv: Depthwise) -> Callable[..., Tensor]:
    weight, channels = conv.weight.float(), len(conv.weight)
    scale = (conv.weight_scale * conv.x.scale).view(-1, 1, 1)
    bias, zero = conv.bias.view(-1, 1, 1), float(conv.x.zero)

    def convolution(x: Tensor, out: Tensor, sums: Tensor | None = None) -> Tensor:
        y = F.conv2d(x.float() - zero, weight, None, conv.stride, conv.padding, 1, channels)
        y = activate(y * scale + bias, conv.act)
        if sums is not None:
            sums.copy_(y.sum((2, 3)))
        y = y * (1.0 / conv.out.scale) + float(conv.out.zero)
        return out.copy_(y.round().clamp(0, LEVELS))

    return convolution
