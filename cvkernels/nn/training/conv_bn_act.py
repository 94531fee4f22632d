"""Convolution, batch norm, activation and shortcut in training, as one function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import FunctionCtx

from cvkernels.nn.fused.match import act_name, autocast_dtype
from cvkernels.nn.training.dense_block import (
    Geometry,
    as_it_is,
    convolution_backward,
    convolve,
    counted,
)
from cvkernels.nn.training.match import operand_dtype
from cvkernels.nn.training.recompute import (
    Node,
    Recipe,
    channels_last,
    new_map,
    recipe_of,
    recipe_or_itself,
    refuse,
    with_recipe,
)
from cvkernels.ops.batch_norm_act import passes
from cvkernels.ops.batch_norm_act.op import norm_backward


class _Normalised(Node):
    """``act(bn(y) + shortcut)`` of channels ``own`` of y, from y, a matrix of one column per
    channel, and what the shortcut is computed from.

    The matrix' rows are batch mean and variance, weight and bias. The last two are copies: a
    consumer in another module keeps no parameter of this one, which may be sharded until its own
    turn comes. ``own`` None is all channels.
    """

    def __init__(self, eps: float, act: str, own: slice | None, shortcut: Node | None) -> None:
        super().__init__()
        self.eps, self.act, self.own, self.shortcut = eps, act, own, shortcut
        self.leaves = 2 if shortcut is None else 2 + shortcut.leaves

    def part(self, tensor: Tensor) -> Tensor:
        return tensor if self.own is None else tensor[:, self.own]

    def write(self, leaves: Sequence[Tensor], out: Tensor) -> None:
        y, vectors, *others = leaves
        residual = None if self.shortcut is None else channels_last(self.shortcut.value(others))
        own = (self.part(channels_last(y)), self.part(vectors))
        passes.again(*own, self.eps, self.act, residual, out)

    def compute(self, leaves: Sequence[Tensor]) -> Tensor:
        out = torch.empty_like(self.part(leaves[0]), memory_format=torch.channels_last)
        self.write(leaves, out)
        return out


class _Call(NamedTuple):
    """What convolution blocks on one map do beside their parameters."""

    geometry: Geometry
    norms: list[nn.BatchNorm2d]
    dtype: torch.dtype
    recipe: Recipe | None
    shortcut: Recipe | None
    nodes: list[_Normalised]
    # Receives what the outputs are computed from.
    leaves: list[Tensor]


# Tensors of a block, in order: weight and bias of its convolution and of its norm.
PER_BLOCK = 4


def conv_bn_act(
    x: Tensor, conv: nn.Conv2d, bn: nn.BatchNorm2d, act: nn.Module | Callable | None,
    residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``act(bn(conv(x)) + residual)`` in training, for what :func:`why_not_trained` lets pass.

    Autograd keeps ``conv(x)``, the batch statistics, and of x and residual those that have no
    recipe. The result is channels_last and has a recipe.
    """
    shortcut = None if residual is None else recipe_or_itself(residual)
    call, tensors = _call(x, [(conv, bn)], act_name(act), shortcut)
    return _with_recipes(call, _ConvBNAct.apply(x, residual, call, *tensors))[0]


def siblings(x: Tensor, blocks: Sequence[tuple[nn.Conv2d, nn.BatchNorm2d]]) -> list[Tensor]:
    """:func:`conv_bn_act` with ReLU of each of blocks on one x, their convolutions run as one.

    These have one geometry and dtype, one group and, where they are several, no bias.
    """
    call, tensors = _call(x, blocks, "relu")
    return _with_recipes(call, _ConvBNAct.apply(x, None, call, *tensors))


def _call(
    x: Tensor,
    blocks: Sequence[tuple[nn.Conv2d, nn.BatchNorm2d]],
    act: str,
    shortcut: Recipe | None = None,
) -> tuple[_Call, list[Tensor | None]]:
    nodes, start, alone = [], 0, len(blocks) == 1
    for conv, bn in blocks:
        own = None if alone else slice(start, start + conv.out_channels)
        source = None if shortcut is None else shortcut.node
        nodes.append(_Normalised(bn.eps, act, own, source))
        start += conv.out_channels
    geometry, norms = Geometry.of(blocks[0][0]), [bn for _, bn in blocks]
    parameters = [module._parameters for block in blocks for module in block]
    tensors = [own[name] for own in parameters for name in ("weight", "bias")]
    call = _Call(
        geometry, norms, operand_dtype(x, autocast_dtype(x)), recipe_of(x), shortcut, nodes, []
    )
    return call, tensors


def _with_recipes(call: _Call, outs: tuple[Tensor, ...]) -> list[Tensor]:
    leaves = (*call.leaves, *(call.shortcut.leaves if call.shortcut else ()))
    return [with_recipe(out, node, leaves) for out, node in zip(outs, call.nodes, strict=True)]


class _ConvBNAct(Function):
    """Saves the convolutions' output, the vectors of their norms, weights, and what x is computed
    from; for a ReLU behind a residual what that one is computed from, too.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, residual: Tensor | None, call: _Call, *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        operand, weights = x.to(call.dtype), tensors[::PER_BLOCK]
        with as_it_is(x):
            # Where there are several convolutions, the first has no bias and none of them has.
            y = convolve(channels_last(operand), _side_by_side(weights), tensors[1], call.geometry)
            vectors = y.new_empty(4, y.shape[1], dtype=passes.wide_dtype(y))
            residual = None if residual is None else channels_last(residual)
            outs = []
            for index, (norm, node) in enumerate(zip(call.norms, call.nodes, strict=True)):
                own, affine = node.part(y), tensors[PER_BLOCK * index + 2 : PER_BLOCK * index + 4]
                out = torch.empty_like(own, memory_format=torch.channels_last)
                # Counted here, not behind the call: a checkpoint runs again until the last tensor
                # is saved.
                passes.forward(
                    own, *affine, counted(norm), node.eps, node.act, residual, node.part(vectors),
                    out,
                )  # fmt: skip
                outs.append(out)
            call.leaves.extend((y, vectors))
        inputs: tuple[Tensor, ...] = ()
        if any(ctx.needs_input_grad[3::PER_BLOCK]):
            inputs = (operand,) if call.recipe is None else call.recipe.leaves
        of_join: tuple[Tensor, ...] = ()
        if residual is not None and call.nodes[0].act == "relu":
            of_join = call.shortcut.leaves
        ctx.save_for_backward(y, vectors, *weights, *of_join, *inputs)
        ctx.nodes, ctx.geometry, ctx.of_join = call.nodes, call.geometry, len(of_join)
        ctx.source = None if call.recipe is None else call.recipe.node
        ctx.shape = x.shape
        ctx.dtypes = [None if t is None else t.dtype for t in (x, *tensors)]
        return tuple(outs)

    @staticmethod
    def backward(ctx: FunctionCtx, *grads_out: Tensor) -> tuple:
        refuse(grads_out[0])
        y, vectors, *saved = ctx.saved_tensors
        weights, saved = saved[: len(ctx.nodes)], saved[len(ctx.nodes) :]
        of_join, inputs = saved[: ctx.of_join], saved[ctx.of_join :]
        needs_x, needs_residual, _, *needs = ctx.needs_input_grad
        wanted = (needs_x, any(needs[::PER_BLOCK]), needs[1])
        grads = [None] * len(needs)
        with as_it_is(y):
            joined = ctx.nodes[0].value((y, vectors, *of_join)) if of_join else None
            y = channels_last(y)
            grad_y = torch.empty_like(y) if any(wanted) else None
            for index, (node, grad) in enumerate(zip(ctx.nodes, grads_out, strict=True)):
                node.drop()
                own = (node.part(y), node.part(vectors), node.eps, node.act)
                out = None if grad_y is None else node.part(grad_y)
                of_vectors, grad_residual = norm_backward(grad, *own, out, joined, spent=True)
                first = PER_BLOCK * index + 2
                grads[first : first + 2] = of_vectors[:2].unbind()
            joined = None
            grad_x = None
            if grad_y is not None:
                if not wanted[1]:
                    # Only its shape and layout count.
                    x = new_map(y, ctx.shape)
                elif ctx.source is None:
                    x = channels_last(inputs[0])
                else:
                    x = ctx.source.value(inputs).to(y.dtype)
                grad_x, grad_weight, grads[1] = convolution_backward(
                    grad_y, x, _side_by_side(weights), ctx.geometry, wanted
                )
                if grad_weight is not None:
                    grads[::PER_BLOCK] = _divided(grad_weight, weights, needs[::PER_BLOCK])
        grads = [
            grad.to(dtype) if grad is not None and dtype is not None and need else None
            for grad, dtype, need in zip(
                (grad_x, *grads), ctx.dtypes, (needs_x, *needs), strict=True
            )
        ]
        return grads[0], grad_residual if needs_residual else None, None, *grads[1:]


def _side_by_side(weights: Sequence[Tensor]) -> Tensor:
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
