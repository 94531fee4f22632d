"""Maps in channels_last memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def new_channels_last(
    like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None
) -> Tensor:
    """An empty channels_last tensor of ``shape``, on like's device, of its dtype by default."""
    return torch.empty(
        shape, dtype=dtype or like.dtype, device=like.device, memory_format=torch.channels_last
    )


def channels_last_view(memory: Tensor, shape: Sequence[int]) -> Tensor:
    """A channels_last tensor of ``shape`` in the memory of a flat one."""
    N, C, H, W = shape
    return memory.as_strided(shape, (H * W * C, 1, W * C, C))
