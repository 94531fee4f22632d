"""How the kernels see a map: as pixels with neighbouring channels, or as dense planes."""

from __future__ import annotations

import torch
from torch import Tensor


def is_nhwc(x: Tensor) -> bool:
    """Whether results for x are channels_last: its channels are neighbours in memory."""
    return x.stride(1) == 1 and x.shape[1] > 1


def pixel_stride(x: Tensor) -> int | None:
    """The one distance between neighbouring pixels of an image, row by row; None if there is none.

    Channel slices of a channels_last buffer have one.
    """
    _, _, H, W = x.shape
    if W == 1:
        return x.stride(2)
    return x.stride(3) if H == 1 or x.stride(2) == W * x.stride(3) else None


def fits(x: Tensor, nhwc: bool) -> bool:
    """Whether the kernels for this layout read x as it is."""
    if not nhwc:
        return x.is_contiguous()
    return (x.stride(1) == 1 or x.shape[1] == 1) and pixel_stride(x) is not None


def fitting(x: Tensor, nhwc: bool) -> Tensor:
    """x, or a copy of it that the kernels for this layout read."""
    if fits(x, nhwc):
        return x
    return x.contiguous(memory_format=_format(nhwc))


def new_like(x: Tensor) -> Tensor:
    """An uninitialised result for x, in the layout that every backend returns."""
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=_format(is_nhwc(x)))


def promised(y: Tensor, x: Tensor) -> Tensor:
    """y in the layout of :func:`new_like`."""
    wanted = torch.empty(x.shape, device="meta", memory_format=_format(is_nhwc(x))).stride()
    return y if y.stride() == wanted else new_like(x).copy_(y)


def matrices(
    weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """The two layers as the kernels read them: dense rows, in both layouts of a 1x1 convolution."""
    return _dense(weight1), _dense(bias1), _dense(weight2), _dense(bias2)


def _dense(t: Tensor | None) -> Tensor | None:
    return t if t is None or t.is_contiguous() else t.contiguous()


def _format(nhwc: bool) -> torch.memory_format:
    return torch.channels_last if nhwc else torch.contiguous_format
