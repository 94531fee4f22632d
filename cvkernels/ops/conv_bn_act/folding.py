"""Batch norm folded into convolution weights, and the cache of what backends derive from them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cvkernels.ops.conv_bn_act.reference import BatchNormParams


def scale_shift(
    bias: Tensor | None, bn: BatchNormParams | None, like: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """``conv * scale + shift`` for a convolution with this bias and batch norm, in ``dtype``."""
    K = like.shape[0]
    one = torch.ones(K, dtype=dtype, device=like.device)
    scale, shift = one, torch.zeros_like(one)
    if bn is not None:
        scale = one if bn.weight is None else bn.weight.to(dtype)
        if bn.var is not None:
            scale = scale * torch.rsqrt(bn.var.to(dtype) + bn.eps)
        if bn.mean is not None:
            shift = -bn.mean.to(dtype) * scale
        if bn.bias is not None:
            shift = shift + bn.bias.to(dtype)
    if bias is not None:
        shift = shift + bias.to(dtype) * scale
    return scale, shift


def fold(weight: Tensor, bias: Tensor | None, bn: BatchNormParams | None) -> tuple[Tensor, Tensor]:
    """Weight and bias of the one convolution that equals conv + batch norm; computed in float64.

    Returns them in weight's dtype, weight's memory format kept.
    """
    with torch.no_grad():
        scale, shift = scale_shift(bias, bn, weight, torch.float64)
        folded = weight.double() * scale.view(-1, 1, 1, 1)
        return folded.to(weight.dtype), shift.to(weight.dtype)


class DerivedWeights:
    """Weights that backends derive from one convolution's parameters: folded, cast or prepacked.

    An entry is valid while every tensor it came from is the same memory at the same version, so an
    optimiser step, ``load_state_dict``, ``.to()`` or ``copy_`` drops it. Writes through ``.data``
    do not change a version: call :meth:`clear` after them (``module.train()`` does). Holds at most
    ``capacity`` entries, the least recently used goes first. Entries carry no gradient.
    """

    def __init__(self, capacity: int = 4) -> None:
        self._capacity = capacity
        self._entries: OrderedDict[Any, tuple[list[Tensor], tuple, Any]] = OrderedDict()

    def get(self, key: Any, sources: list[Tensor | None], build: Callable[[], Any]) -> Any:
        """What ``build()`` gives for ``sources``, from the cache where it is still valid."""
        tensors = [t for t in sources if t is not None]
        if any(t.is_inference() or t.is_meta for t in tensors):
            # Neither has a version or memory of its own to recognise a change by.
            return build()
        stamp = tuple([(t.data_ptr(), t._version, t.dtype, t.shape) for t in tensors])
        entry = self._entries.get(key)
        if entry is not None and entry[1] == stamp:
            self._entries.move_to_end(key)
            return entry[2]
        # The detached sources keep their memory alive: no other tensor can come to its address.
        value = build()
        self._entries[key] = ([t.detach() for t in tensors], stamp, value)
        while len(self._entries) > self._capacity:
            self._entries.popitem(last=False)
        return value

    def clear(self) -> None:
        self._entries.clear()

    def __len__(self) -> int:
        return len(self._entries)
