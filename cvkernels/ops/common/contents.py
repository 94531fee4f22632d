"""A digest of what tensors hold, for caches of what was derived from them.

A version counter misses writes through ``.data``, through a NumPy view or by a fused optimiser. So
a sample of the contents is read at every use: each element of a vector, and of a weight
[K, C, ...] max(K, C) elements that touch every filter and every input channel.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence

import torch
from torch import Tensor

from cvkernels import extension

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Steps through the taps of a kernel: coprime to 9 and 25, so that all of them are read.
TAP_STEP = 7


class Contents:
    """The contents of CPU tensors, which must keep their memory, shapes and strides."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._sample = None
        if extension.has("cpu"):
            self._sample = importlib.import_module("cvkernels._C").Sample(
                [
                    (t.data_ptr(), t.element_size(), tuple(t.shape), t.stride(), t.dim() < 2)
                    for t in tensors
                ]
            )
        else:
            self._sampled = [_sampled(t.detach()) for t in tensors]

    def digest(self) -> int:
        """A number that differs, but for one chance in 2^64, where the sample does."""
        if self._sample is not None:
            return self._sample.digest()
        return hash(tuple(tuple(view[index].tolist()) for view, index in self._sampled))


def _sampled(tensor: Tensor) -> tuple[Tensor, tuple[Tensor, ...] | slice]:
    """The tensor's bits, and which of them are read."""
    bits = tensor.view(_BITS[tensor.element_size()])
    if tensor.dim() < 2 or not tensor.numel():
        return bits, slice(None)
    K, C, *taps = tensor.shape
    steps = torch.arange(max(K, C), device="cpu")
    at, left = [steps % K, steps % C], steps * TAP_STEP
    for size in reversed(taps):
        at.insert(2, left % size)
        left = left // size
    return bits, tuple(at)
