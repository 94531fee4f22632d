"""Concatenation and max pool in training, of maps that backward computes again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import FunctionCtx

from cvkernels import functional
from cvkernels.nn.training.recompute import (
    Node,
    Recipe,
    channels_last,
    new_map,
    recipe_of,
    refuse,
    with_recipe,
)
from cvkernels.ops.common.pool import Window, window_of

_aten = torch.ops.aten


class _Concatenated(Node):
    def __init__(self, parts: Sequence[Node], widths: Sequence[int], shape: torch.Size) -> None:
        super().__init__()
        self.parts, self.widths, self.shape = parts, widths, shape
        self.leaves = sum(part.leaves for part in parts)

    def compute(self, leaves: Sequence[Tensor]) -> Tensor:
        buffer = new_map(leaves[0], self.shape)
        leaf = channel = 0
        for part, width in zip(self.parts, self.widths, strict=True):
            part.write(leaves[leaf : leaf + part.leaves], buffer[:, channel : channel + width])
            leaf, channel = leaf + part.leaves, channel + width
        return buffer


class _Pooled(Node):
    def __init__(self, source: Node, window: Window) -> None:
        super().__init__()
        self.source, self.window, self.leaves = source, window, source.leaves
        self._indices: Tensor | None = None

    def compute(self, leaves: Sequence[Tensor]) -> Tensor:
        out, self._indices = _aten.max_pool2d_with_indices(self.source.value(leaves), *self.window)
        return out

    def indices(self, leaves: Sequence[Tensor]) -> Tensor:
        """Where in its source each element comes from."""
        self.value(leaves)
        return self._indices

    def drop(self) -> None:
        super().drop()
        self._indices = None


def max_pool(x: Tensor, recipe: Recipe, pool: nn.MaxPool2d) -> Tensor:
    """``pool(x)`` for an x that has ``recipe``: autograd keeps neither x nor indices."""
    window = window_of(
        "max_pool", pool.kernel_size, pool.stride, pool.padding, pool.dilation, pool.ceil_mode
    )
    node = _Pooled(recipe.node, window)
    return with_recipe(_MaxPool.apply(x, node, recipe.leaves), node, recipe.leaves)


class _MaxPool(Function):
    """Saves what x is computed from."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, node: _Pooled, leaves: tuple[Tensor, ...]) -> Tensor:
        ctx.save_for_backward(*leaves)
        ctx.node = node
        return functional.max_pool(x, *node.window)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple:
        refuse(grad)
        leaves, node = ctx.saved_tensors, ctx.node
        indices, x = node.indices(leaves), node.source.value(leaves)
        node.drop()
        grad = channels_last(grad)
        return _aten.max_pool2d_with_indices_backward(grad, x, *node.window, indices), None, None


def concatenated(parts: list[Tensor]) -> Tensor:
    """``torch.cat(parts, 1)``; the result has a recipe where all parts have."""
    recipes = [recipe_of(part) for part in parts]
    if None in recipes or len({part.dtype for part in parts}) > 1:
        return torch.cat(parts, 1)
    leaves = tuple(leaf for recipe in recipes for leaf in recipe.leaves)
    nodes = [recipe.node for recipe in recipes]
    out, node = _Concatenate.apply(nodes, *parts)
    return with_recipe(out, node, leaves)


class _Concatenate(Function):
    """Saves nothing."""

    @staticmethod
    def forward(ctx: FunctionCtx, nodes: list[Node], *parts: Tensor) -> tuple[Tensor, Node]:
        out, ctx.widths = torch.cat(parts, 1), [part.shape[1] for part in parts]
        ctx.node = _Concatenated(nodes, ctx.widths, out.shape)
        return out, ctx.node

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor, *_) -> tuple:
        ctx.node.drop()
        return None, *grad.split(ctx.widths, 1)
