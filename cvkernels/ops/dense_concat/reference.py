"""What dense_concat leaves in the buffer, in plain PyTorch: the specification."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cvkernels.ops.common.norm import BatchNormParams, normalize


def appended(src: Tensor, bn: BatchNormParams | None, relu: bool) -> Tensor:
    y = src if bn is None else normalize(src, bn)
    return F.relu(y) if relu else y


def dense_concat_reference(
    buffer: Tensor, src: Tensor, start: int, bn: BatchNormParams | None = None, relu: bool = False
) -> Tensor:
    """buffer with its channels [start, start + C) replaced by ``relu(bn(src))``."""
    stop = start + src.size(1)
    return torch.cat([buffer[:, :start], appended(src, bn, relu), buffer[:, stop:]], dim=1)
