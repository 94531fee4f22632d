"""What a call moves, and the compulsory traffic of sliding windows: the ops' byte models."""

from __future__ import annotations

import functools
from typing import NamedTuple

from torch import Tensor


class Traffic(NamedTuple):
    """What a call costs: launches, and each byte that it needs or makes, once."""

    kernels: int
    bytes_read: int
    bytes_written: int


def nbytes(*tensors: Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


@functools.lru_cache(maxsize=1024)
def touched_positions(
    size: int, taps: int, stride: int, padding: int, dilation: int, windows: int
) -> int:
    """How many of ``size`` positions along one axis some of ``windows`` windows reads."""
    starts = range(-padding, -padding + windows * stride, stride)
    return len(
        {
            position
            for start in starts
            for position in range(start, start + taps * dilation, dilation)
            if 0 <= position < size
        }
    )
