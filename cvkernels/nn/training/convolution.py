"""Convolution and its gradients, as functions of tensors; 1x1 on CPU as matrix products."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cvkernels.ops.common.layout import channels_last, new_channels_last

# On CPU a matrix product is faster than oneDNN's 1x1 convolution up to so many pixels of a map, and
# always where there are few channels.
SMALL_MAP = 14 * 14
FEW_CHANNELS = 32


class Geometry(NamedTuple):
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int

    @classmethod
    def of(cls, conv: nn.Conv2d) -> Geometry:
        return cls(conv.stride, conv.padding, conv.dilation, conv.groups)


POINTWISE = Geometry((1, 1), (0, 0), (1, 1), 1)


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """The convolution of a channels_last x, in x's dtype; channels_last."""
    if _is_product(x, weight, bias, geometry):
        y = new_channels_last(x, (x.shape[0], weight.shape[0], *x.shape[2:]))
        torch.mm(_matrix(x), _matrix(weight.to(x.dtype)).t(), out=_matrix(y))
        return y
    bias = None if bias is None else bias.to(x.dtype)
    return channels_last(F.conv2d(x, weight.to(x.dtype), bias, *geometry))


def convolution_backward(
    grad: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, needed: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients in x, weight and bias, those of the three needed."""
    d_x = d_weight = None
    if not needed[2] and _is_product(x, weight, None, geometry):
        if needed[0]:
            d_x = torch.empty_like(x)
            torch.mm(_matrix(grad), _matrix(weight.to(x.dtype)), out=_matrix(d_x))
        if needed[1] and _is_small(x):
            d_weight = _sum_of_products(_matrix(grad), _matrix(x)).view(weight.shape)
        needed = (False, needed[1] and d_weight is None, False)
    if not any(needed):
        return d_x, d_weight, None
    stride, padding, dilation, groups = geometry
    bias_sizes = [weight.shape[0]] if needed[2] else None
    others = torch.ops.aten.convolution_backward(
        grad, x, weight.to(x.dtype), bias_sizes, stride, padding, dilation, False, [0, 0], groups,
        list(needed),
    )  # fmt: skip
    return d_x if others[0] is None else others[0], *others[1:]


def _is_product(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> bool:
    """Whether the convolution is run as one matrix product."""
    if not x.is_cpu or bias is not None or weight.shape[2:] != (1, 1) or geometry != POINTWISE:
        return False
    return _is_small(x) or min(weight.shape[:2]) < FEW_CHANNELS


def _is_small(x: Tensor) -> bool:
    return x.shape[2] * x.shape[3] <= SMALL_MAP


def _matrix(x: Tensor) -> Tensor:
    """A dense channels_last map as [pixels, C], or a 1x1 weight as [outputs, inputs]."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _sum_of_products(a: Tensor, b: Tensor) -> Tensor:
    """``a.T @ b``, summed in parts: the product's own sum errs twice as much as oneDNN's."""
    parts = min(4, max(1, a.shape[0] // 64))
    rows = -(-a.shape[0] // parts)
    (first, second), *others = zip(a.split(rows), b.split(rows), strict=True)
    total = torch.mm(first.t(), second)
    for first, second in others:
        total.addmm_(first.t(), second)
    return total
