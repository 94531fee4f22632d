"""Concatenation and max pool in training, of maps that backward recomputes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import FunctionCtx

from cvkernels import functional
from cvkernels.nn.training.recompute import (
    Recompute,
    RecomputeNode,
    recompute_of,
    with_recompute,
)
from cvkernels.ops.common.autograd import without_gradient
from cvkernels.ops.common.differentiable import needs_stock
from cvkernels.ops.common.layout import channels_last
from cvkernels.ops.common.pool import Window, window_of, with_padding
from cvkernels.ops.common.recycled import new_map

_aten = torch.ops.aten


class _Concatenated(RecomputeNode):
    def __init__(
        self, parts: Sequence[RecomputeNode], widths: Sequence[int], shape: torch.Size
    ) -> None:
        super().__init__()
        self.parts, self.widths, self.shape = parts, widths, shape
        self.count = sum(part.count for part in parts)

    def compute(self, saved: Sequence[Tensor]) -> Tensor:
        buffer = new_map(saved[0], self.shape)
        for part, out in zip(self.parts, buffer.split(self.widths, 1), strict=True):
            part.write(saved[: part.count], out)
            saved = saved[part.count :]
        return buffer


class _Pooled(RecomputeNode):
    def __init__(self, source: RecomputeNode, window: Window) -> None:
        super().__init__()
        self.source, self.window, self.count = source, window, source.count
        self._indices: Tensor | None = None

    def compute(self, saved: Sequence[Tensor]) -> Tensor:
        out, self._indices = _aten.max_pool2d_with_indices(self.source.value(saved), *self.window)
        return out

    def indices(self, saved: Sequence[Tensor]) -> Tensor:
        """Where in its source each element comes from."""
        self.value(saved)
        return self._indices

    def drop(self) -> None:
        super().drop()
        self._indices = None


def max_pool(x: Tensor, recompute: Recompute, pool: nn.MaxPool2d) -> Tensor:
    """``pool(x)`` for an x that has ``recompute``: autograd keeps neither x nor indices."""
    window = window_of(
        "max_pool", pool.kernel_size, pool.stride, pool.padding, pool.dilation, pool.ceil_mode
    )
    if with_padding(x, window)[0] is not x:
        return functional.max_pool(x, *window)
    node = _Pooled(recompute.node, window)
    return with_recompute(_MaxPool.apply(x, node, recompute.saved), node, recompute.saved)


class _MaxPool(Function):
    """Saves what x is computed from."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, node: _Pooled, saved: tuple[Tensor, ...]) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*saved)
        ctx.node = node
        return functional.max_pool(x, *node.window)

    @staticmethod
    @without_gradient
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple:
        saved, node = ctx.saved_tensors, ctx.node
        indices, x = node.indices(saved), node.source.value(saved)
        node.drop()
        if not needs_stock(grad):
            grad = channels_last(grad)
        return _aten.max_pool2d_with_indices_backward(grad, x, *node.window, indices), None, None


def concatenated(parts: list[Tensor]) -> Tensor:
    """``torch.cat(parts, 1)``; the result is recomputed where all parts are."""
    recomputes = [recompute_of(part) for part in parts]
    if None in recomputes or len({part.dtype for part in parts}) > 1:
        return torch.cat(parts, 1)
    saved = tuple(tensor for recompute in recomputes for tensor in recompute.saved)
    out, node = _Concatenate.apply([recompute.node for recompute in recomputes], *parts)
    return with_recompute(out, node, saved)


class _Concatenate(Function):
    """Saves nothing."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, nodes: list[RecomputeNode], *parts: Tensor
    ) -> tuple[Tensor, RecomputeNode]:
        ctx.set_materialize_grads(False)
        out, ctx.widths = torch.cat(parts, 1), [part.shape[1] for part in parts]
        ctx.node = _Concatenated(nodes, ctx.widths, out.shape)
        return out, ctx.node

    @staticmethod
    @without_gradient
    def backward(ctx: FunctionCtx, grad: Tensor, *_) -> tuple:
        ctx.node.drop()
        return None, *grad.split(ctx.widths, 1)
