"""Training that keeps convolution outputs alone: batch norm, ReLU, concatenation, pooling redone.

``relu(bn(conv(x)))`` in training saves the convolution's output ``y`` and its batch statistics; the
normalised map is computed again from them in backward, as in Gruslys et al. 2016, arXiv:1606.03401,
and Pleiss et al. 2017, arXiv:1707.06990. The next convolution's input is then such a map, a
concatenation or a max pool of such, and is not saved either: whoever computes the map leaves a
:class:`Recipe` on the tensor, and a consumer that finds it saves what it names, tensors that are
saved anyway. Without a recipe (the image, a module of somebody else in between, a map that was
changed in place) the input is saved as usual.

Each map is computed again once: the first to need it in backward keeps it for the others, and the
function that computed it in forward, which is behind them all in backward, lets it go. Statistics
are computed, and running ones updated, in forward alone.

Derivatives of derivatives are refused by name; several threads may not run backward through one
graph at once.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx

from cvkernels import functional
from cvkernels.functional import BatchNormParams
from cvkernels.nn.conditions import (
    TRAINED,
    autocast_dtype,
    relu_,
    why_not_batch_norm,
    why_not_called,
    why_not_differentiated_here,
)
from cvkernels.nn.dense_training import (
    Geometry,
    Statistics,
    as_it_is,
    convolution_backward,
    convolve,
    update_running,
)
from cvkernels.ops.batch_norm_act import passes
from cvkernels.ops.batch_norm_act.op import norm_backward, refuse_create_graph
from cvkernels.ops.pool import Window, window_of

_aten = torch.ops.aten


# What was computed, and from what


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
            kept = self._value = (stream, self._compute(leaves))
        return kept[1]

    def drop(self) -> None:
        self._value = None

    def write(self, leaves: Sequence[Tensor], out: Tensor) -> None:
        """Write the map to out, and keep it nowhere else where that can be."""
        out.copy_(self.value(leaves))

    def _compute(self, leaves: Sequence[Tensor]) -> Tensor:
        raise NotImplementedError


class _Normalised(Node):
    """``relu(bn(y))``, of y and a matrix whose rows are batch mean and variance, weight and bias.

    The last two are copies: a consumer in another module keeps no parameter of this one, which may
    be sharded until its own turn comes.
    """

    leaves = 2

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def bn(self, vectors: Tensor) -> BatchNormParams:
        mean, var, weight, bias = vectors.unbind()
        return BatchNormParams(weight, bias, mean, var, self.eps)

    def write(self, leaves: Sequence[Tensor], out: Tensor) -> None:
        passes.apply(_channels_last(leaves[0]), self.bn(leaves[1]), True, out)

    def _compute(self, leaves: Sequence[Tensor]) -> Tensor:
        out = torch.empty_like(leaves[0], memory_format=torch.channels_last)
        self.write(leaves, out)
        return out


class _Concatenated(Node):
    def __init__(self, parts: Sequence[Node], widths: Sequence[int], shape: torch.Size) -> None:
        super().__init__()
        self.parts, self.widths, self.shape = parts, widths, shape
        self.leaves = sum(part.leaves for part in parts)

    def _compute(self, leaves: Sequence[Tensor]) -> Tensor:
        buffer = leaves[0].new_empty(self.shape).contiguous(memory_format=torch.channels_last)
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

    def _compute(self, leaves: Sequence[Tensor]) -> Tensor:
        out, self._indices = _aten.max_pool2d_with_indices(self.source.value(leaves), *self.window)
        return out

    def indices(self, leaves: Sequence[Tensor]) -> Tensor:
        """Where in its source each element comes from."""
        self.value(leaves)
        return self._indices

    def drop(self) -> None:
        super().drop()
        self._indices = None


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
    if type(x) is not Tensor or _why_not_saved_less(x):
        return None
    recipe = getattr(x, "recipe", None)
    return recipe if type(recipe) is Recipe and recipe.holds(x) else None


def _saved_tensor_hooks() -> object:
    """What autograd calls now for each tensor that is saved."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False)


def _with_recipe(x: Tensor, node: Node, leaves: tuple[Tensor, ...]) -> Tensor:
    x.recipe = Recipe(node, leaves, x._version)
    return x


# Conditions


def why_not_recomputed(
    x: Tensor, conv: nn.Module, bn: nn.Module | None, act: nn.Module | Callable | None
) -> str:
    """Why the modules have to be called; empty where :func:`conv_bn_relu` trains the same."""
    if type(conv) is not nn.Conv2d:
        return f"{type(conv).__name__} is not exactly nn.Conv2d"
    if act is not relu_ and type(act) is not nn.ReLU:
        return f"{type(act).__name__} is not exactly nn.ReLU"
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return f"padding={conv.padding!r} with padding_mode={conv.padding_mode!r} is not fused"
    if reason := why_not_called(x, conv, bn, act if isinstance(act, nn.Module) else None):
        return reason
    if reason := why_not_batch_norm(x, conv.out_channels, bn) or _why_not_saved_less(x):
        return reason
    parameters = (conv.weight, conv.bias, bn.weight, bn.bias)
    if not any(t is not None and t.requires_grad for t in (x, *parameters)):
        return "no gradient is needed"
    if conv.weight.device != x.device:
        return f"the convolution is on {conv.weight.device}"
    dtype = _operand_dtype(x)
    if dtype not in TRAINED or dtype != _operand_dtype(conv.weight):
        return f"the input is {x.dtype} and the weight {conv.weight.dtype}"
    if x.dim() != 4 or _values_per_channel(x, conv) < 2:
        return "the input is not [N, C, H, W] with more than one value per channel behind conv"
    return ""


def _why_not_saved_less(x: Tensor) -> str:
    """Why autograd, or who traces it, has to see the single operations."""
    if not torch.is_grad_enabled():
        return "no gradient is needed"
    if isinstance(x, FakeTensor) or x.layout is not torch.strided:
        return f"the input is a {type(x).__name__} of layout {x.layout}"
    return why_not_differentiated_here()


def _values_per_channel(x: Tensor, conv: nn.Conv2d) -> int:
    """N * P * Q of conv(x); at most 0 where it does not fit."""
    count = x.shape[0]
    options = (conv.kernel_size, conv.stride, conv.padding, conv.dilation)
    for size, kernel, stride, padding, dilation in zip(x.shape[2:], *options, strict=True):
        count *= max(0, (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1)
    return count


def _operand_dtype(x: Tensor) -> torch.dtype:
    """What a convolution takes x in: autocast leaves float64 alone."""
    return x.dtype if x.dtype == torch.float64 else autocast_dtype(x) or x.dtype


# Convolution, batch norm, ReLU


class _Call(NamedTuple):
    """What a convolution block does beside its parameters."""

    geometry: Geometry
    bn: nn.BatchNorm2d
    dtype: torch.dtype
    recipe: Recipe | None
    node: _Normalised
    # Receives what the output is computed from.
    leaves: list[Tensor]


def conv_bn_relu(x: Tensor, conv: nn.Conv2d, bn: nn.BatchNorm2d) -> Tensor:
    """``relu(bn(conv(x)))`` in training, for what :func:`why_not_recomputed` lets pass.

    Autograd keeps ``conv(x)``, the batch statistics and, where it has no recipe, x. The result is
    channels_last.
    """
    call = _Call(Geometry.of(conv), bn, _operand_dtype(x), recipe_of(x), _Normalised(bn.eps), [])
    out = _ConvBNReLU.apply(x, conv.weight, conv.bias, bn.weight, bn.bias, call)
    return _with_recipe(out, call.node, tuple(call.leaves))


class _ConvBNReLU(Function):
    """Saves the convolution's output, the vectors of its norm, the weight, and leaves or x."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        call: _Call,
    ) -> Tensor:
        operand = x.to(call.dtype)
        with as_it_is(x):
            y = convolve(_channels_last(operand), weight, bias, call.geometry)
            vectors = y.new_zeros(4, y.shape[1], dtype=passes.wide_dtype(y))
            statistics = Statistics(*vectors[:2].unbind())
            passes.statistics(y, statistics)
            # Here, not behind the call: a checkpoint runs again until the last tensor is saved.
            update_running(call.bn, statistics, y.numel() // y.shape[1])
            vectors[2] = 1.0 if norm_weight is None else norm_weight
            if norm_bias is not None:
                vectors[3] = norm_bias
            out = torch.empty_like(y)
            call.node.write((y, vectors), out)
        call.leaves.extend((y, vectors))
        inputs: tuple[Tensor, ...] = ()
        if ctx.needs_input_grad[1]:
            inputs = (operand,) if call.recipe is None else call.recipe.leaves
        ctx.save_for_backward(y, vectors, weight, *inputs)
        ctx.node, ctx.geometry = call.node, call.geometry
        ctx.source = None if call.recipe is None else call.recipe.node
        ctx.shape = x.shape
        ctx.dtypes = [
            t if t is None else t.dtype for t in (x, weight, bias, norm_weight, norm_bias)
        ]
        return out

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple:
        _refuse(grad)
        y, vectors, weight, *inputs = ctx.saved_tensors
        ctx.node.drop()
        needs, needs_norm = ctx.needs_input_grad[:3], ctx.needs_input_grad[3:5]
        grads = [None, None, None]
        with as_it_is(y):
            y = _channels_last(y)
            grad_y, *grads_norm = norm_backward(
                grad, y, ctx.node.bn(vectors), True, (any(needs), *needs_norm)
            )
            if grad_y is not None:
                if not needs[1]:
                    # Only its shape and layout count.
                    x = _channels_last(y.new_empty(ctx.shape))
                elif ctx.source is None:
                    x = _channels_last(inputs[0])
                else:
                    x = ctx.source.value(inputs).to(y.dtype)
                grads = convolution_backward(grad_y, x, weight, ctx.geometry, needs)
        grads = zip((*grads, *grads_norm), ctx.dtypes, strict=True)
        return *(g if g is None else g.to(dtype) for g, dtype in grads), None


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _refuse(grad: Tensor) -> None:
    refuse_create_graph("A convolution block that recomputes its activations")
    functorch = torch._C._functorch
    if functorch.is_functorch_wrapped_tensor(grad) or functorch.is_legacy_batchedtensor(grad):
        raise RuntimeError(
            "A convolution block that recomputes its activations takes one gradient at a time, not "
            "is_grads_batched=True; run the forward pass under cvkernels.backend.use('reference')"
        )


# Max pool and concatenation of such maps


def max_pool(x: Tensor, recipe: Recipe, pool: nn.MaxPool2d) -> Tensor:
    """``pool(x)`` for an x that has ``recipe``: autograd keeps neither x nor indices."""
    window = window_of(
        "max_pool", pool.kernel_size, pool.stride, pool.padding, pool.dilation, pool.ceil_mode
    )
    node = _Pooled(recipe.node, window)
    return _with_recipe(_MaxPool.apply(x, node, recipe.leaves), node, recipe.leaves)


class _MaxPool(Function):
    """Saves what x is computed from."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, node: _Pooled, leaves: tuple[Tensor, ...]) -> Tensor:
        ctx.save_for_backward(*leaves)
        ctx.node = node
        return functional.max_pool(x, *node.window)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple:
        _refuse(grad)
        leaves, node = ctx.saved_tensors, ctx.node
        indices, x = node.indices(leaves), node.source.value(leaves)
        node.drop()
        grad = _channels_last(grad)
        return _aten.max_pool2d_with_indices_backward(grad, x, *node.window, indices), None, None


def concatenated(parts: list[Tensor]) -> Tensor:
    """``torch.cat(parts, 1)``; the result has a recipe where all parts have."""
    recipes = [recipe_of(part) for part in parts]
    if None in recipes or len({part.dtype for part in parts}) > 1:
        return torch.cat(parts, 1)
    leaves = tuple(leaf for recipe in recipes for leaf in recipe.leaves)
    nodes = [recipe.node for recipe in recipes]
    out, node = _Concatenate.apply(nodes, *parts)
    return _with_recipe(out, node, leaves)


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
