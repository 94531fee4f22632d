"""Between numbers and bytes, pools and means of bytes: csrc/quantised/cpu.cpp, and by PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cvkernels import extension
from cvkernels.ops.common import native
from cvkernels.ops.quantised.quantisation import LEVELS, Quantisation

library = torch.library.Library("cvkernels", "FRAGMENT")
library.define(
    "quantised_map(Tensor x, float scale, float shift, float fill, Tensor(a!) out) -> ()"
)
library.define(
    "quantised_mean(Tensor x, float scale, float shift, Tensor? affine, Tensor(a!) out) -> ()"
)
extension.load()
for _name in ("map", "mean"):
    native.writes(library, f"quantised_{_name}")


def quantise(x: Tensor, to: Quantisation, out: Tensor) -> Tensor:
    """Write float32[N, C, H, W] as bytes; channels that out has more stand for 0."""
    scale, shift = 1.0 / to.scale, float(to.zero)
    if extension.has("cpu"):
        torch.ops.cvkernels.quantised_map(x, scale, shift, shift, out)
        return out
    out[:, : x.shape[1]].copy_((x * scale + shift).round().clamp(0, LEVELS))
    out[:, x.shape[1] :] = to.zero
    return out


def dequantise(x: Tensor, of: Quantisation, out: Tensor) -> Tensor:
    """Write what the bytes of uint8[N, C, H, W] stand for as float32."""
    if extension.has("cpu"):
        torch.ops.cvkernels.quantised_map(x, of.scale, -of.zero * of.scale, 0.0, out)
        return out
    return out.copy_(of.dequantise(x))


def mean(x: Tensor, of: Quantisation, affine: Tensor | None, out: Tensor) -> Tensor:
    """Write the mean of each channel over the pixels to float32[N, C].

    ``affine`` [2, C], where given, are scale and shift that make numbers of bytes, before a ReLU.
    """
    if extension.has("cpu"):
        torch.ops.cvkernels.quantised_mean(x, of.scale, -of.zero * of.scale, affine, out)
        return out
    if affine is None:
        return out.copy_(of.dequantise(x).mean((2, 3)))
    scale, shift = affine.view(2, -1, 1, 1)
    return out.copy_((x * scale + shift).clamp_min(0.0).mean((2, 3)))


def max_pool(x: Tensor, window: tuple, out: Tensor) -> Tensor:
    kernel, stride, padding, dilation, ceil = window
    if extension.has("cpu"):
        torch.ops.cvkernels.max_pool_out(x, *window, out)
        return out
    return out.copy_(F.max_pool2d(x.float(), kernel, stride, padding, dilation, ceil))


def avg_pool(
    x: Tensor, window: tuple, count_include_pad: bool, divisor: int | None, affine: Tensor | None,
    out: Tensor,
) -> Tensor:  # fmt: skip
    """Averages, rounded; of ``relu(x * affine[0] + affine[1])`` where these are given."""
    kernel, stride, padding, _, ceil = window
    options = (ceil, count_include_pad, divisor)
    if extension.has("cpu"):
        vectors = (None, None) if affine is None else affine.view(2, -1).unbind()
        norm = (*vectors, None, None, 0.0)
        torch.ops.cvkernels.avg_pool_out(x, kernel, stride, padding, *options, *norm, out)
        return out
    u = x.float()
    if affine is not None:
        scale, shift = affine.view(2, -1, 1, 1)
        u = (u * scale + shift).clamp_min(0.0)
    averages = F.avg_pool2d(u, kernel, stride, padding, *options)
    return out.copy_(averages.round().clamp(0, LEVELS))
