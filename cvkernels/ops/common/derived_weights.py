"""The cache of what backends derive from a convolution's parameters."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class DerivedWeights:
    """Weights that backends derive from one convolution's parameters: folded, cast or prepacked.

    An entry is valid while every tensor it came from is the same memory at the same version, so an
    optimiser step, ``load_state_dict``, ``.to()`` or ``copy_`` drops it. Writes through ``.data``
    do not change a version: call :meth:`clear` after them (``module.train()`` does). Holds at most
    ``capacity`` entries, the least recently used goes first. Entries carry no gradient.

    While a CUDA graph is captured nothing is kept or given from here: a graph derives again at each
    replay, from the parameters as they are then. ``constant`` says that they never change; what was
    derived before is the graph's then.
    """

    def __init__(self, capacity: int = 4, *, constant: bool = False) -> None:
        self._capacity = capacity
        self._constant = constant
        self._entries: OrderedDict[Any, tuple[list[Tensor], tuple, Any]] = OrderedDict()

    def get(self, key: Any, sources: list[Tensor | None], build: Callable[[], Any]) -> Any:
        """What ``build()`` gives for ``sources``, from the cache where it is still valid."""
        tensors = [t for t in sources if t is not None]
        if any(t.is_inference() or t.is_meta for t in tensors):
            # Neither has a version or memory of its own to recognise a change by.
            return build()
        gpu = next((t.device for t in tensors if t.is_cuda), None)
        captured = gpu is not None and torch.cuda.is_current_stream_capturing()
        if captured and not self._constant:
            return build()
        stamp = tuple([(t.data_ptr(), t._version, t.dtype, t.shape) for t in tensors])
        entry = self._entries.get(key)
        if entry is not None and entry[1] == stamp:
            self._entries.move_to_end(key)
            return entry[2]
        # The detached sources keep their memory alive: no other tensor can come to its address.
        value = build()
        if captured:
            return value
        if gpu is not None:  # for whoever takes it on another stream
            torch.cuda.current_stream(gpu).synchronize()
        self._entries[key] = ([t.detach() for t in tensors], stamp, value)
        while len(self._entries) > self._capacity:
            self._entries.popitem(last=False)
        return value

    def clear(self) -> None:
        self._entries.clear()

    def __len__(self) -> int:
        return len(self._entries)
