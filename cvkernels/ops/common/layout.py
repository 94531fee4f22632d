"""How a map lies in memory: as pixels with neighbouring channels, or as dense planes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def is_nhwc(x: Tensor) -> bool:
    """Whether results for x are channels_last: its channels are neighbours in memory."""
    return x.stride(1) == 1 and x.shape[1] > 1


def gives_channels_last(x: Tensor) -> bool:
    """Whether PyTorch convolves to channels_last with x as the input or as the weight."""
    return x.dim() == 4 and is_nhwc(x) and x.stride(3) >= x.shape[1]


def format_of(nhwc: bool) -> torch.memory_format:
    return torch.channels_last if nhwc else torch.contiguous_format


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def new_channels_last(
    like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None
) -> Tensor:
    """An empty channels_last tensor of ``shape`` on like's device, of its dtype if not given."""
    return torch.empty(
        shape, dtype=dtype or like.dtype, device=like.device, memory_format=torch.channels_last
    )


def channels_last_view(memory: Tensor, shape: Sequence[int]) -> Tensor:
    """A channels_last tensor of ``shape`` in the memory of a flat one."""
    N, C, H, W = shape
    return memory.as_strided(shape, (H * W * C, 1, W * C, C))


def pixel_stride(x: Tensor) -> int | None:
    """The one distance between neighbouring pixels of an image, row by row; None if there is none.

    Channel slices of a channels_last buffer have one.
    """
    _, _, H, W = x.shape
    if W == 1:
        return x.stride(2)
    return x.stride(3) if H == 1 or x.stride(2) == W * x.stride(3) else None


def is_pixel_matrix(x: Tensor) -> bool:
    """Whether x is channels_last or a channel slice of such a tensor: a matrix of all pixels."""
    if x.is_contiguous(memory_format=torch.channels_last):
        return True
    N, C, H, W = x.shape
    stride_n, stride_c, stride_h, stride_w = x.stride()
    if C > 1 and stride_c != 1:
        return False
    step, length = C, 1
    for size, stride in ((W, stride_w), (H, stride_h), (N, stride_n)):
        if size == 1:
            continue
        if length == 1:
            step = stride
        if stride != step * length:
            return False
        length *= size
    return step >= C


def fits(x: Tensor, nhwc: bool) -> bool:
    """Whether kernels that go image by image in this layout read x as it is."""
    if not nhwc:
        return x.is_contiguous()
    return (x.stride(1) == 1 or x.shape[1] == 1) and pixel_stride(x) is not None


def fitting(x: Tensor, nhwc: bool) -> Tensor:
    """x, or a copy of it that the kernels for this layout read."""
    return x if fits(x, nhwc) else x.contiguous(memory_format=format_of(nhwc))


def new_like(x: Tensor) -> Tensor:
    """An uninitialised result for x, in the layout that every backend returns."""
    layout = format_of(is_nhwc(x))
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=layout)


def in_format(y: Tensor, layout: torch.memory_format) -> Tensor:
    """y with exactly the strides of a fresh tensor in this format, which a fake promises."""
    promised = torch.empty(y.shape, device="meta", memory_format=layout).stride()
    return y if y.stride() == promised else y.clone(memory_format=layout)


def overlaps_itself(x: Tensor) -> bool:
    """Whether several indices of x may be one element, as of an expanded tensor: whether one of its
    strides is within what the smaller ones span. Traced, it sees expanded tensors alone."""
    pairs = list(zip(x.stride(), x.shape, strict=True))
    if any(stride == 0 and size > 1 for stride, size in pairs):
        return True
    if torch.compiler.is_compiling() or 0 in x.shape:  # sizes that may vary cannot be sorted
        return False
    span = 0
    for stride, size in sorted(pairs):
        if size > 1 and stride <= span:
            return True
        span += stride * (size - 1)
    return False
