"""An input's place in the graph, for a function that recomputes the input and does not save it.

Under ``create_graph=True`` a gradient is a function of the input, and has to be linked to it. So
the input is saved all the same, and what autograd keeps of it is replaced by an empty tensor: with
that it gives back an alias of the input, at the same edge of the graph, to be filled with the
recomputed data.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor
from torch.autograd import Function
from torch.autograd.graph import saved_tensors_hooks

from cvkernels.nn.training.recompute import saved_tensor_hooks


def apply(function: type[Function], x: Tensor, *args: Any) -> Any:
    """``function.apply(x, *args)``, a tuple; of x, which it saves first, no data is kept.

    The function saves None instead where x needs no gradient.
    """
    if not x.requires_grad:
        return function.apply(x, *args)
    if hooks := saved_tensor_hooks():
        around = _Hooks(*hooks)
        with saved_tensors_hooks(around.pack, around.unpack):
            return function.apply(x, *args)
    results = function.apply(x, *args)
    if (node := results[0].grad_fn) is not None:
        node._raw_saved_tensors[0].register_hooks(_without_data, _unchanged)
    return results


def filled(place: Tensor | None, data: Tensor) -> Tensor:
    """What the function got as x, from what it saved first and a copy of x's data."""
    if place is None:
        return data
    place.data = data
    return place


def _without_data(x: Tensor) -> Tensor:
    return x.new_empty(0)


def _unchanged(x: Tensor) -> Tensor:
    return x


class _Place(NamedTuple):
    empty: Tensor


class _Hooks:
    """The caller's hooks for all tensors but the first, which they do not see."""

    def __init__(self, pack: Callable, unpack: Callable) -> None:
        self._pack, self._unpack, self._first = pack, unpack, True

    def pack(self, tensor: Tensor) -> Any:
        if self._first:
            self._first = False
            return _Place(_without_data(tensor))
        return self._pack(tensor)

    def unpack(self, packed: Any) -> Tensor:
        return packed.empty if type(packed) is _Place else self._unpack(packed)
