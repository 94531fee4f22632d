"""What a map was computed from, and computing it again in backward."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from cvkernels.nn.fused.match import why_not_differentiated_here
from cvkernels.ops.batch_norm_act.op import refuse_create_graph

# As many tensors a shortcut may be computed from; the end of a longer chain is saved.
MOST_LEAVES = 64


class Node:
    """How a map is computed from ``leaves`` saved tensors, and the map while backward needs it."""

    leaves = 0

    def __init__(self) -> None:
        self._value: tuple[object, Tensor] | None = None

    def value(self, leaves: Sequence[Tensor]) -> Tensor:
        """The map, kept until :meth:`drop`."""
        stream = torch.cuda.current_stream(leaves[0].device) if leaves[0].is_cuda else None
        kept = self._value
        # Only what this stream computed is known to be there.
        if kept is None or kept[0] != stream:
            kept = self._value = (stream, self.compute(leaves))
        return kept[1]

    def drop(self) -> None:
        self._value = None

    def write(self, leaves: Sequence[Tensor], out: Tensor) -> None:
        """Write the map to out, and keep it nowhere else where that can be."""
        out.copy_(self.value(leaves))

    def compute(self, leaves: Sequence[Tensor]) -> Tensor:
        raise NotImplementedError


class Given(Node):
    """A map that is saved itself."""

    leaves = 1

    def value(self, leaves: Sequence[Tensor]) -> Tensor:
        return leaves[0]


class Recipe:
    """What a tensor is computed from; stands on the tensor as the attribute ``recipe``.

    It holds for the tensor as it was made, and where saved tensors go the same way as those that it
    names: inside a checkpointed function it is not used for what comes from outside.
    """

    __slots__ = ("_hooks", "_version", "leaves", "node")

    def __init__(self, node: Node, leaves: tuple[Tensor, ...], version: int) -> None:
        self.node, self.leaves = node, leaves
        self._version, self._hooks = version, _saved_tensor_hooks()

    def holds(self, x: Tensor) -> bool:
        return x._version == self._version and _saved_tensor_hooks() == self._hooks

    def __reduce__(self) -> tuple:
        # A copy or a saved file of the tensor has no graph: nothing of what it came from is in it.
        return OrderedDict, ()


def recipe_of(x: Tensor) -> Recipe | None:
    """The recipe that x carries, if what is computed from x here may use it."""
    if type(x) is not Tensor or why_not_saved_less(x):
        return None
    recipe = getattr(x, "recipe", None)
    if type(recipe) is not Recipe or not recipe.holds(x):
        return None
    return None if len(recipe.leaves) > 2 and _copies_what_is_saved() else recipe


def recipe_or_itself(x: Tensor) -> Recipe:
    """:func:`recipe_of` x; where there is none, or the chain behind it is long, x itself."""
    recipe = recipe_of(x)
    if recipe is not None and len(recipe.leaves) <= MOST_LEAVES:
        return recipe
    return Recipe(Given(), (x,), x._version)


def _saved_tensor_hooks() -> object:
    """What autograd calls now for each tensor that is saved."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False)


def _copies_what_is_saved() -> bool:
    """Whether a tensor that is saved twice is kept twice: then one map is less than a chain."""
    hooks = _saved_tensor_hooks()
    return bool(hooks) and getattr(hooks[0], "__qualname__", "").startswith("save_on_cpu")


def with_recipe(x: Tensor, node: Node, leaves: tuple[Tensor, ...]) -> Tensor:
    x.recipe = Recipe(node, leaves, x._version)
    return x


def why_not_saved_less(x: Tensor) -> str:
    """Why autograd, or who traces it, has to see the single operations."""
    if not torch.is_grad_enabled():
        return "no gradient is needed"
    if isinstance(x, FakeTensor) or x.layout is not torch.strided:
        return f"the input is a {type(x).__name__} of layout {x.layout}"
    return why_not_differentiated_here()


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def new_map(like: Tensor, shape: torch.Size) -> Tensor:
    return torch.empty(
        shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last
    )


def refuse(grad: Tensor) -> None:
    refuse_create_graph("A convolution block that recomputes its activations")
    functorch = torch._C._functorch
    if functorch.is_functorch_wrapped_tensor(grad) or functorch.is_legacy_batchedtensor(grad):
        raise RuntimeError(
            "A convolution block that recomputes its activations takes one gradient at a time, not "
            "is_grads_batched=True; run the forward pass under cvkernels.backend.use('reference')"
        )
