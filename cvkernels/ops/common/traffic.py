"""What a call costs, and the compulsory traffic of sliding windows: what byte models share."""

from __future__ import annotations

from typing import NamedTuple


class Traffic(NamedTuple):
    """What a fused call costs."""

    kernels: int
    bytes_read: int
    bytes_written: int


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
