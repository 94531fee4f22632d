"""What avg_pool computes, in plain PyTorch: the specification, and the fallback everywhere."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from cvkernels.ops.common.norm import BatchNormParams, normalize


def avg_pool_reference(
    x: Tensor,
    kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int] | None = None,
    padding: int | tuple[int, int] = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
    input_bn: BatchNormParams | None = None,
) -> Tensor:
    """The mean of each window of each channel of x, or of ``relu(input_bn(x))``."""
    if input_bn is not None:
        x = F.relu(normalize(x, input_bn))
    return F.avg_pool2d(
        x, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override
    )
