"""How bytes stand for numbers (Jacob et al. 2018, arXiv:1712.05877)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

LEVELS = 255  # steps between the smallest and the largest byte
LARGEST = 127  # of a weight: -128 is none, so that a weight can change its sign


class Quantisation(NamedTuple):
    """Bytes q of a tensor, which stand for ``(q - zero) * scale``."""

    scale: float
    zero: int

    @classmethod
    def of_range(cls, low: float, high: float) -> Quantisation:
        """That of numbers from low to high, and of 0; some quantisation of 0 alone."""
        low, high = min(low, 0.0), max(high, 0.0)
        scale = (high - low) / LEVELS
        if not scale > torch.finfo(torch.float32).tiny:
            return cls(1.0 / LEVELS, 0)
        return cls(scale, min(LEVELS, max(0, round(-low / scale))))

    def quantise(self, x: Tensor) -> Tensor:
        """The nearest bytes, ties to even."""
        return (x * (1.0 / self.scale) + float(self.zero)).round().clamp(0, LEVELS).byte()

    def dequantise(self, q: Tensor) -> Tensor:
        return (q.float() - self.zero) * self.scale


def quantise_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight[K, ...] as int8 and float32[K] scales, one for each output channel.

    Of some ranges that cut off the largest weights, the one with the smallest mean squared error.
    """
    rows = weight.detach().double().flatten(1)
    largest = rows.abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny)
    best = torch.full_like(largest, float("inf"))
    scales = largest / LARGEST
    for share in (1.0, 0.95, 0.9, 0.85, 0.8, 0.7):
        scale = largest * share / LARGEST
        rounded = (rows / scale[:, None]).round().clamp(-LARGEST, LARGEST)
        error = (rounded * scale[:, None] - rows).square().sum(1)
        better = error < best
        best, scales = torch.where(better, error, best), torch.where(better, scale, scales)
    scales = scales.float()
    q = (rows / scales.double()[:, None]).round().clamp(-LARGEST, LARGEST)
    return q.to(torch.int8).view(weight.shape), scales
