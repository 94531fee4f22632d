"""The cache of what backends derive from a convolution's parameters."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cvkernels.ops.common.contents import Contents

PLANS = 8  # kinds of calls whose plans a cache keeps


class _Entry(NamedTuple):
    # Keeps the memory of the tensors alive: no other comes to its address.
    held: list[Tensor]
    stamp: tuple
    contents: Contents | None
    digest: int
    value: Any


class DerivedWeights:
    """Weights that backends derive from one convolution's parameters: folded, cast or prepacked.

    An entry is used while every tensor that it came from is the same memory at the same version
    and, on CPU, holds the same: a sample of the contents, which touches every filter, every input
    channel and all of a norm's vectors, is compared each time. So a change of a filter, a channel
    or a norm is seen however it was made; single weights of a filter that are written past the
    version counter (through ``.data``, say) need :meth:`clear`. Nothing is kept of tensors in
    shared memory or of inference mode. On CUDA, where a sample would wait for the GPU, memory and
    version count alone. Holds at most ``capacity`` entries, the least recently used goes first.
    Entries carry no gradient.

    While a CUDA graph is captured nothing is kept or given from here: a graph derives again at each
    replay, from the parameters as they are then. ``constant`` says that they never change: contents
    are not compared, and what was derived before is the graph's.
    """

    def __init__(self, capacity: int = 4, *, constant: bool = False) -> None:
        self._capacity = capacity
        self._constant = constant
        self._entries: OrderedDict[Any, _Entry] = OrderedDict()
        self._plans: DerivedWeights | None = None

    def get(self, key: Any, sources: Sequence[Tensor | None], build: Callable[[], Any]) -> Any:
        """What ``build()`` gives for ``sources``, from the cache where it is still valid."""
        tensors = [t for t in sources if t is not None]
        if any(t.is_inference() or t.is_meta for t in tensors):
            return build()
        # by the storage: Tensor.is_shared takes four times as long
        if not self._constant and any(
            t.is_cpu and t.untyped_storage().is_shared() for t in tensors
        ):
            return build()
        gpu = next((t.device for t in tensors if t.is_cuda), None)
        captured = gpu is not None and torch.cuda.is_current_stream_capturing()
        if captured and not self._constant:
            return build()
        stamp = tuple([(t.data_ptr(), t._version, t.dtype, t.shape, t.stride()) for t in tensors])
        entry = self._entries.get(key)
        if entry is not None and entry.stamp == stamp:
            if entry.contents is None or entry.contents.digest() == entry.digest:
                self._entries.move_to_end(key)
                return entry.value
        compared = not self._constant and all(t.is_cpu for t in tensors)
        contents = Contents(tensors) if compared else None
        digest = 0 if contents is None else contents.digest()
        value = build()
        if captured:
            return value
        if gpu is not None:  # for use on another stream
            torch.cuda.current_stream(gpu).synchronize()
        self._entries[key] = _Entry([t.detach() for t in tensors], stamp, contents, digest, value)
        while len(self._entries) > self._capacity:
            self._entries.popitem(last=False)
        return value

    def plan(self, key: Any, sources: Sequence[Tensor | None], build: Callable[[], Any]) -> Any:
        """:meth:`get` of a plan that holds what was derived; plans have room of their own."""
        if self._plans is None:
            self._plans = DerivedWeights(PLANS, constant=self._constant)
        return self._plans.get(key, sources, build)

    def clear(self) -> None:
        self._entries.clear()
        self._plans = None

    def __len__(self) -> int:
        return len(self._entries)


def derived(
    cache: DerivedWeights | None, key: Any, sources: Sequence[Tensor | None], build: Callable
) -> Any:
    """What ``build()`` gives for ``sources``, from the cache where there is one."""
    return build() if cache is None else cache.get(key, sources, build)
