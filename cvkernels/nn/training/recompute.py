"""What a map was computed from, and computing it again in backward."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from cvkernels.nn.training.match import why_not_recompute

# A shortcut is computed from at most so many tensors; the end of a longer chain is saved.
MOST_SAVED = 64


class RecomputeNode:
    """Computes a map from ``count`` saved tensors; keeps the map while backward needs it."""

    count = 0

    def __init__(self) -> None:
        self._value: tuple[object, Tensor] | None = None

    def value(self, saved: Sequence[Tensor]) -> Tensor:
        """The map, outside the graph, kept until :meth:`drop`."""
        stream = torch.cuda.current_stream(saved[0].device) if saved[0].is_cuda else None
        kept = self._value
        # What another stream computed may not be finished.
        if kept is None or kept[0] != stream:
            with torch.no_grad():
                kept = self._value = (stream, self.compute(saved))
        return kept[1]

    def drop(self) -> None:
        self._value = None

    def write(self, saved: Sequence[Tensor], out: Tensor) -> None:
        """Write the map to out, without keeping it where the node can compute it in place."""
        out.copy_(self.value(saved))

    def compute(self, saved: Sequence[Tensor]) -> Tensor:
        raise NotImplementedError


class Saved(RecomputeNode):
    """A map that is saved itself."""

    count = 1

    def value(self, saved: Sequence[Tensor]) -> Tensor:
        return saved[0]


class Recompute:
    """How a tensor is computed (``node``) from tensors that autograd saves anyway (``saved``).

    It is valid while neither the tensor nor what it is computed from has been written since, and
    under the saved-tensor hooks of its forward: within a checkpointed function, none from outside
    it is.
    """

    __slots__ = ("_hooks", "_version", "_versions", "node", "saved")

    def __init__(self, node: RecomputeNode, saved: tuple[Tensor, ...], version: int) -> None:
        self.node, self.saved = node, saved
        self._version, self._hooks = version, saved_tensor_hooks()
        self._versions = _versions(saved)

    def is_valid(self, x: Tensor) -> bool:
        return (
            x._version == self._version
            and saved_tensor_hooks() == self._hooks
            and _versions(self.saved) == self._versions
        )

    def __reduce__(self) -> tuple:
        # A pickled or copied tensor has no graph, and takes none of the saved tensors along.
        return OrderedDict, ()


def with_recompute(x: Tensor, node: RecomputeNode, saved: tuple[Tensor, ...]) -> Tensor:
    """x, its private attribute ``_cvkernels_recompute`` set, where :func:`recompute_of` looks.

    An attribute, since it must live exactly as long as the tensor and be read at every layer.
    """
    x._cvkernels_recompute = Recompute(node, saved, x._version)
    return x


def recompute_of(x: Tensor) -> Recompute | None:
    """How x is recomputed, if a consumer here may save that instead of x."""
    if type(x) is not Tensor or why_not_recompute(x):
        return None
    recompute = getattr(x, "_cvkernels_recompute", None)
    if type(recompute) is not Recompute or not recompute.is_valid(x):
        return None
    return None if len(recompute.saved) > 2 and _hooks_copy() else recompute


def recompute_or_saved(x: Tensor) -> Recompute:
    """:func:`recompute_of` x; where there is none, or the chain behind it is long, x itself."""
    recompute = recompute_of(x)
    if recompute is not None and len(recompute.saved) <= MOST_SAVED:
        return recompute
    return Recompute(Saved(), (x,), x._version)


def _versions(tensors: Sequence[Tensor]) -> list[int]:
    return [tensor._version for tensor in tensors]


def saved_tensor_hooks() -> object:
    """The hooks that autograd calls now for each tensor that is saved."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False)


def _hooks_copy() -> bool:
    """True under save_on_cpu, which copies every saved tensor: saving the map itself is then
    cheaper than saving its sources."""
    hooks = saved_tensor_hooks()
    return bool(hooks) and getattr(hooks[0], "__qualname__", "").startswith("save_on_cpu")
