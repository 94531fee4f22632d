"""What max_pool computes, in plain PyTorch: the specification, and the fallback everywhere."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from cvkernels.ops.common.pool import window_of, with_padding


def max_pool_reference(
    x: Tensor,
    kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int] | None = None,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    ceil_mode: bool = False,
) -> Tensor:
    """The largest element of each window of each channel."""
    window = window_of("max_pool", kernel_size, stride, padding, dilation, ceil_mode)
    x, window = with_padding(x, window)
    return F.max_pool2d(x, *window)
