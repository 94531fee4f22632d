"""Convolution, batch norm, activation and shortcut in training, as one function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import FunctionCtx

from cvkernels.nn.fused.match import act_name
from cvkernels.nn.training import place
from cvkernels.nn.training.batch_norm import Share, normalise
from cvkernels.nn.training.convolution import Geometry, convolution_backward, convolve
from cvkernels.nn.training.recompute import (
    Recompute,
    RecomputeNode,
    recompute_of,
    recompute_or_saved,
    with_recompute,
)
from cvkernels.ops.batch_norm_act import passes
from cvkernels.ops.batch_norm_act.op import norm_backward
from cvkernels.ops.common.activation import activate
from cvkernels.ops.common.autograd import (
    autocast_disabled,
    operand_dtype,
    to_dtype,
    without_gradient,
)
from cvkernels.ops.common.differentiable import needs_stock, stock_gradients
from cvkernels.ops.common.layout import channels_last
from cvkernels.ops.common.recycled import new_map

# Tensors of a block, in order: weight and bias of its convolution and of its norm.
PER_BLOCK = 4


class _Normalised(RecomputeNode):
    """``act(bn(y) + shortcut)`` of channels ``own`` of y, from y, a matrix of one column per
    channel, and what the shortcut is computed from.

    The matrix' rows are batch mean and variance, weight and bias. The last two are copies: a
    consumer in another module keeps no parameter of this one, which may be sharded until its own
    turn comes. ``own`` None is all channels.
    """

    def __init__(
        self, eps: float, act: str, own: slice | None, shortcut: RecomputeNode | None
    ) -> None:
        super().__init__()
        self.eps, self.act, self.own, self.shortcut = eps, act, own, shortcut
        self.count = 2 if shortcut is None else 2 + shortcut.count

    def part(self, tensor: Tensor) -> Tensor:
        return tensor if self.own is None else tensor[:, self.own]

    def write(self, saved: Sequence[Tensor], out: Tensor) -> None:
        y, vectors, *of_shortcut = saved
        residual = None
        if self.shortcut is not None:
            residual = channels_last(self.shortcut.value(of_shortcut))
        own = (self.part(channels_last(y)), self.part(vectors))
        passes.recompute(*own, self.eps, self.act, residual, out)

    def compute(self, saved: Sequence[Tensor]) -> Tensor:
        out = new_map(self.part(saved[0]))
        self.write(saved, out)
        return out


class _Call(NamedTuple):
    """What convolution blocks on one map take beside the tensors that gradients are needed in."""

    geometry: Geometry
    norms: list[nn.BatchNorm2d]
    dtype: torch.dtype
    source: Recompute | None
    shortcut: Recompute | None
    nodes: list[_Normalised]


def conv_bn_act(
    x: Tensor, conv: nn.Conv2d, bn: nn.BatchNorm2d, act: nn.Module | Callable | None,
    residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``act(bn(conv(x)) + residual)`` in training, where nothing is against it (see match.py).

    Autograd keeps ``conv(x)``, the batch statistics, and of x and residual those that are not
    recomputed. The result is channels_last, and is recomputed.
    """
    return _run(x, [(conv, bn)], act_name(act), residual)[0]


def siblings(x: Tensor, blocks: Sequence[tuple[nn.Conv2d, nn.BatchNorm2d]]) -> list[Tensor]:
    """:func:`conv_bn_act` with ReLU of each of blocks on one x, their convolutions run as one.

    These have one geometry and dtype, one group and, where they are several, no bias.
    """
    return _run(x, blocks, "relu")


def _run(
    x: Tensor, blocks: Sequence[tuple[nn.Conv2d, nn.BatchNorm2d]], act: str,
    residual: Tensor | None = None,
) -> list[Tensor]:  # fmt: skip
    shortcut = None if residual is None else recompute_or_saved(residual)
    nodes, start = [], 0
    for conv, bn in blocks:
        own = None if len(blocks) == 1 else slice(start, start + conv.weight.shape[0])
        nodes.append(_Normalised(bn.eps, act, own, None if shortcut is None else shortcut.node))
        start += conv.weight.shape[0]
    geometry, norms = Geometry.of(blocks[0][0]), [bn for _, bn in blocks]
    call = _Call(geometry, norms, operand_dtype(x), recompute_of(x), shortcut, nodes)
    parameters = [module._parameters for block in blocks for module in block]
    tensors = [own[name] for own in parameters for name in ("weight", "bias")]
    *outs, saved = place.apply(_ConvBNAct, x, residual, call, *tensors)
    return [with_recompute(out, node, saved) for out, node in zip(outs, nodes, strict=True)]


class _ConvBNAct(Function):
    """Saves x's place, the convolutions' output, the vectors of their norms, the parameters, and
    what x is computed from; for a ReLU behind a residual what that one is computed from, too.
    Returns what the outputs are computed from with them.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, residual: Tensor | None, call: _Call, *tensors: Tensor | None
    ) -> tuple:
        ctx.set_materialize_grads(False)
        operand, weights = x.to(call.dtype), tensors[::PER_BLOCK]
        with autocast_disabled(x):
            # Where there are several convolutions, the first has no bias and none of them has.
            y = convolve(channels_last(operand), _side_by_side(weights), tensors[1], call.geometry)
            vectors = y.new_empty(4, y.shape[1], dtype=passes.wide_dtype(y))
            residual = None if residual is None else channels_last(residual)
            share = Share(call.norms[0], y)
            if share.group is not None:  # else a norm's passes begin with them
                share.statistics(y, vectors[0], vectors[1])
            outs = []
            for index, (norm, node) in enumerate(zip(call.norms, call.nodes, strict=True)):
                own, affine = node.part(y), tensors[PER_BLOCK * index + 2 : PER_BLOCK * index + 4]
                out = new_map(own)
                # Counted here, not behind the call: a checkpoint runs again until the last tensor
                # is saved.
                normalise(
                    own, affine, norm, share, node.eps, node.act, residual, node.part(vectors), out
                )
                outs.append(out)
        inputs: tuple[Tensor, ...] = ()
        if any(ctx.needs_input_grad[3::PER_BLOCK]):
            inputs = (operand,) if call.source is None else call.source.saved
        of_shortcut = () if call.shortcut is None else call.shortcut.saved
        of_join = of_shortcut if call.nodes[0].act == "relu" else ()
        linked = x if ctx.needs_input_grad[0] else None
        ctx.save_for_backward(linked, y, vectors, *tensors, *of_join, *inputs)
        ctx.nodes, ctx.geometry, ctx.of_join = call.nodes, call.geometry, len(of_join)
        ctx.share = share
        ctx.source = None if call.source is None else call.source.node
        ctx.shape = x.shape
        ctx.dtypes = [None if t is None else t.dtype for t in (x, *tensors)]
        return *outs, (y, vectors, *of_shortcut)

    @staticmethod
    @without_gradient
    def backward(ctx: FunctionCtx, *grads_out: Tensor | None) -> tuple:
        if needs_stock(*grads_out[:-1]):
            ctx.share.refuse_second_derivatives()
            return _stock_gradients(ctx, grads_out[:-1])
        _, y, vectors, tensors, of_join, inputs = _saved(ctx)
        weights = tensors[::PER_BLOCK]
        needs_x, needs_residual, _, *needs = ctx.needs_input_grad
        wanted = (needs_x, any(needs[::PER_BLOCK]), needs[1])
        grads = [None] * len(needs)
        grad_x = None
        with autocast_disabled(y):
            output = ctx.nodes[0].value((y, vectors, *of_join)) if of_join else None
            y = channels_last(y)
            grad_y = new_map(y) if any(wanted) else None
            for index, (node, grad) in enumerate(zip(ctx.nodes, grads_out[:-1], strict=True)):
                node.drop()
                own = (node.part(y), node.part(vectors), node.eps, node.act)
                out = None if grad_y is None else node.part(grad_y)
                if grad is None:  # of one convolution of several
                    needs[PER_BLOCK * index] = False
                    if out is not None:
                        out.zero_()
                    continue
                of_vectors, grad_residual = norm_backward(
                    grad, *own, out, output, may_overwrite=True, join=ctx.share.joins()
                )
                first = PER_BLOCK * index + 2
                grads[first : first + 2] = of_vectors[:2].unbind()
            output = None  # frees it before the convolution's gradients
            if grad_y is not None:
                if not wanted[1]:
                    x = new_map(y, ctx.shape)  # only its shape and layout are read
                elif ctx.source is None:
                    x = channels_last(inputs[0])
                else:
                    x = ctx.source.value(inputs).to(y.dtype)
                grad_x, grad_weight, grads[1] = convolution_backward(
                    grad_y, x, _side_by_side(weights), ctx.geometry, wanted
                )
                if grad_weight is not None:
                    grads[::PER_BLOCK] = _divided(grad_weight, weights, needs[::PER_BLOCK])
        grad_x, *grads = (
            grad.to(dtype) if grad is not None and dtype is not None and need else None
            for grad, dtype, need in zip(
                (grad_x, *grads), ctx.dtypes, (needs_x, *needs), strict=True
            )
        )
        return grad_x, grad_residual if needs_residual else None, None, *grads


def _saved(ctx: FunctionCtx) -> tuple:
    """x's place, y, vectors, the parameters, what the output and what x are computed from."""
    linked, y, vectors, *others = ctx.saved_tensors
    tensors, others = others[: len(ctx.dtypes) - 1], others[len(ctx.dtypes) - 1 :]
    return linked, y, vectors, tensors, others[: ctx.of_join], others[ctx.of_join :]


def _stock_gradients(ctx: FunctionCtx, grads: Sequence[Tensor | None]) -> tuple:
    """What backward returns, by stock operations."""
    linked, y, vectors, tensors, of_join, inputs = _saved(ctx)
    needs_x, needs_residual, _, *needs = ctx.needs_input_grad
    with autocast_disabled(y):
        if of_join:
            # What ReLU stopped in forward it stops here: the residual's values are not needed.
            grads = [grads[0].masked_fill(ctx.nodes[0].value((y, vectors, *of_join)) <= 0, 0)]
        for node in ctx.nodes:
            node.drop()
        if inputs:
            data = inputs[0] if ctx.source is None else ctx.source.value(inputs)
            data = data.detach().to(ctx.dtypes[0], copy=True)
        else:
            data = y.new_zeros(ctx.shape, dtype=ctx.dtypes[0])

        def compute(x: Tensor, *tensors: Tensor | None) -> list[Tensor]:
            operand, outs = x.to(y.dtype), []
            for index, node in enumerate(ctx.nodes):
                weight, bias, *affine = tensors[PER_BLOCK * index :][:PER_BLOCK]
                bias = to_dtype(bias, y.dtype)
                own = F.conv2d(operand, weight.to(y.dtype), bias, *ctx.geometry)
                if not inputs:  # no weight needs a gradient: linear in x, whose data is not kept
                    own = own + (node.part(y) - own).detach()
                out = F.batch_norm(own, None, None, *affine, True, 0.0, node.eps)
                outs.append(out if of_join else activate(out, node.act))
            return outs

        operands = (place.filled(linked, data), *tensors)
        grad_x, *others = stock_gradients(compute, operands, (needs_x, *needs), grads)
    return grad_x, grads[0] if needs_residual else None, None, *others


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
