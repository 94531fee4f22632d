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
    """``relu(bn(y))`` of channels ``own`` of y, from y and a matrix of one column per channel.

    Its rows are batch mean and variance, weight and bias. The last two are copies: a consumer in
    another module keeps no parameter of this one, which may be sharded until its own turn comes.
    """

    leaves = 2

    def __init__(self, eps: float, own: slice) -> None:
        super().__init__()
        self.eps, self.own = eps, own

    def bn(self, vectors: Tensor) -> BatchNormParams:
        mean, var, weight, bias = vectors[:, self.own].unbind()
        return BatchNormParams(weight, bias, mean, var, self.eps)

    def write(self, leaves: Sequence[Tensor], out: Tensor) -> None:
        y, vectors = leaves
        passes.apply(_channels_last(y)[:, self.own], self.bn(vectors), "relu", out)

    def _compute(self, leaves: Sequence[Tensor]) -> Tensor:
        own = leaves[0][:, self.own]
        out = torch.empty_like(own, memory_format=torch.channels_last)
        self.write(leaves, out)
        return out


class _Concatenated(Node):
    def __init__(self, parts: Sequence[Node], widths: Sequence[int], shape: torch.Size) -> None:
        super().__init__()
        self.parts, self.widths, self.shape = parts, widths, shape
        self.leaves = sum(part.leaves for part in parts)

    def _compute(self, leaves: Sequence[Tensor]) -> Tensor:
        buffer = _new_map(leaves[0], self.shape)
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
    """What convolution blocks on one map do beside their parameters."""

    geometry: Geometry
    norms: list[nn.BatchNorm2d]
    dtype: torch.dtype
    recipe: Recipe | None
    nodes: list[_Normalised]
    # Receives what the outputs are computed from.
    leaves: list[Tensor]


# Tensors of a block, in order: weight and bias of its convolution and of its norm.
PER_BLOCK = 4


def conv_bn_relu(x: Tensor, conv: nn.Conv2d, bn: nn.BatchNorm2d) -> Tensor:
    """``relu(bn(conv(x)))`` in training, for what :func:`why_not_recomputed` lets pass.

    Autograd keeps ``conv(x)``, the batch statistics and, where it has no recipe, x. The result is
    channels_last.
    """
    return siblings(x, [(conv, bn)])[0]


def siblings(x: Tensor, blocks: Sequence[tuple[nn.Conv2d, nn.BatchNorm2d]]) -> list[Tensor]:
    """:func:`conv_bn_relu` of each of blocks on one x, their convolutions run as one.

    These have one geometry and dtype, one group and, where they are several, no bias.
    """
    nodes, start = [], 0
    for conv, bn in blocks:
        own = slice(start, start + conv.out_channels)
        nodes.append(_Normalised(bn.eps, own))
        start = own.stop
    geometry, norms = Geometry.of(blocks[0][0]), [bn for _, bn in blocks]
    call = _Call(geometry, norms, _operand_dtype(x), recipe_of(x), nodes, [])
    tensors = [t for conv, bn in blocks for t in (conv.weight, conv.bias, bn.weight, bn.bias)]
    outs = _ConvBNReLU.apply(x, call, *tensors)
    leaves = tuple(call.leaves)
    return [_with_recipe(out, node, leaves) for out, node in zip(outs, nodes, strict=True)]


class _ConvBNReLU(Function):
    """Saves the convolutions' output, the vectors of their norms, weights, and leaves or x."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, call: _Call, *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        operand, weights = x.to(call.dtype), tensors[::PER_BLOCK]
        with as_it_is(x):
            # Where there are several convolutions, the first has no bias and none of them has.
            y = convolve(_channels_last(operand), _joined(weights), tensors[1], call.geometry)
            vectors = y.new_zeros(4, y.shape[1], dtype=passes.wide_dtype(y))
            passes.statistics(y, (vectors[0], vectors[1]))
            affine = zip(tensors[2::PER_BLOCK], tensors[3::PER_BLOCK], strict=True)
            for norm, node, (weight, bias) in zip(call.norms, call.nodes, affine, strict=True):
                own = vectors[:, node.own]
                # Here, not behind the call: a checkpoint runs again until the last tensor is saved.
                update_running(norm, Statistics(own[0], own[1]), y.numel() // y.shape[1])
                own[2] = 1.0 if weight is None else weight
                if bias is not None:
                    own[3] = bias
            call.leaves.extend((y, vectors))
            outs = tuple(node._compute(call.leaves) for node in call.nodes)
        inputs: tuple[Tensor, ...] = ()
        if any(ctx.needs_input_grad[2::PER_BLOCK]):
            inputs = (operand,) if call.recipe is None else call.recipe.leaves
        ctx.save_for_backward(y, vectors, *weights, *inputs)
        ctx.nodes, ctx.geometry = call.nodes, call.geometry
        ctx.source = None if call.recipe is None else call.recipe.node
        ctx.shape = x.shape
        ctx.dtypes = [t if t is None else t.dtype for t in (x, *tensors)]
        return outs

    @staticmethod
    def backward(ctx: FunctionCtx, *grads_out: Tensor) -> tuple:
        _refuse(grads_out[0])
        y, vectors, *saved = ctx.saved_tensors
        weights, inputs = saved[: len(ctx.nodes)], saved[len(ctx.nodes) :]
        needs_x, _, *needs = ctx.needs_input_grad
        wanted = (needs_x, any(needs[::PER_BLOCK]), needs[1])
        grads = [None] * len(needs)
        with as_it_is(y):
            y = _channels_last(y)
            grad_y = torch.empty_like(y) if any(wanted) else None
            for index, (node, grad) in enumerate(zip(ctx.nodes, grads_out, strict=True)):
                node.drop()
                first = PER_BLOCK * index
                out = None if grad_y is None else grad_y[:, node.own]
                needed = (out is not None, *needs[first + 2 : first + 4])
                own = y[:, node.own]
                _, *of_norm = norm_backward(grad, own, node.bn(vectors), "relu", needed, out)
                grads[first + 2 : first + 4] = of_norm
            grad_x = None
            if grad_y is not None:
                if not wanted[1]:
                    # Only its shape and layout count.
                    x = _new_map(y, ctx.shape)
                elif ctx.source is None:
                    x = _channels_last(inputs[0])
                else:
                    x = ctx.source.value(inputs).to(y.dtype)
                grad_x, grad_weight, grads[1] = convolution_backward(
                    grad_y, x, _joined(weights), ctx.geometry, wanted
                )
                if grad_weight is not None:
                    grads[::PER_BLOCK] = _divided(grad_weight, weights, needs[::PER_BLOCK])
        grads = zip((grad_x, *grads), ctx.dtypes, strict=True)
        grad_x, *grads = (g if g is None else g.to(dtype) for g, dtype in grads)
        return grad_x, None, *grads


def _joined(weights: Sequence[Tensor]) -> Tensor:
    """The weight of the convolutions run as one."""
    return weights[0] if len(weights) == 1 else torch.cat(tuple(weights))


def _divided(
    grad: Tensor, weights: Sequence[Tensor], needed: Sequence[bool]
) -> list[Tensor | None]:
    """The gradients of single weights, each in memory of its own, where they are needed."""
    if len(weights) == 1:
        return [grad]
    parts = grad.split([len(weight) for weight in weights])
    return [part.clone() if need else None for part, need in zip(parts, needed, strict=True)]


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _new_map(like: Tensor, shape: torch.Size) -> Tensor:
    return torch.empty(
        shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last
    )


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
