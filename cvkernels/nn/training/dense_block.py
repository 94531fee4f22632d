"""Training a dense block on one feature buffer, as one autograd function.

What autograd keeps of a block grows linearly with its layers: the buffer, each layer's conv1 output
(nothing with ``memory_efficient``) and the batch statistics, which each channel has once, from when
it is written, for all norms that read it. The backward pass computes norm and ReLU again from
these; running statistics are not touched there. The gradients of a channel's readers are summed in
one buffer, in float32 (float64 for float64). Huang et al. 2017, arXiv:1608.06993; the shared
storage is Pleiss et al. 2017's, arXiv:1707.06990.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cvkernels.functional import BatchNormParams
from cvkernels.nn.training import place
from cvkernels.nn.training.batch_norm import Share, Statistics, normalise, update_running
from cvkernels.nn.training.convolution import Geometry, convolution_backward, convolve
from cvkernels.ops.batch_norm_act import passes
from cvkernels.ops.batch_norm_act.op import norm_backward
from cvkernels.ops.common.autograd import (
    autocast_disabled,
    needs_grad,
    to_dtype,
    without_gradient,
)
from cvkernels.ops.common.differentiable import needs_stock, stock_gradients
from cvkernels.ops.common.layout import channels_last, channels_last_view
from cvkernels.ops.common.recycled import new_map

# Tensors of a layer, in order: weight and bias of norm1, conv1, norm2 and conv2.
PER_LAYER = 8


class _Layer(NamedTuple):
    """What a layer computes by, but for its tensors."""

    inputs: int
    # The channels of its conv1 output among those of all layers, and of its output in the buffer.
    own: slice
    outputs: slice
    eps: tuple[float, float]
    geometry: tuple[Geometry, Geometry]
    recompute: bool


def run_block(
    x: Tensor, layers: Sequence[tuple[nn.Module, ...]], recompute: Sequence[bool]
) -> tuple[Tensor, Statistics]:
    """The block's output on x and the statistics of its channels; ``layers`` hold (norm1, conv1,
    norm2, conv2). Running statistics are updated at the end, so that an error leaves them alone.
    """
    described, start, inputs = [], 0, x.shape[1]
    for (norm1, conv1, norm2, conv2), repeat in zip(layers, recompute, strict=True):
        own = slice(start, start + conv1.weight.shape[0])
        outputs = slice(inputs, inputs + conv2.weight.shape[0])
        eps, geometry = (norm1.eps, norm2.eps), (Geometry.of(conv1), Geometry.of(conv2))
        described.append(_Layer(inputs, own, outputs, eps, geometry, repeat))
        start, inputs = own.stop, outputs.stop
    tensors = [tensor for parts in layers for part in parts for tensor in (part.weight, part.bias)]
    keep = needs_grad(x, *tensors)
    share = Share(layers[0][0], x)
    buffer, mean, var, widths = place.apply(_DenseBlock, x, described, share, keep, *tensors)
    for layer, (norm1, _, norm2, _) in zip(described, layers, strict=True):
        update_running(norm1, Statistics(mean[: layer.inputs], var[: layer.inputs], share))
        update_running(norm2, Statistics(*widths[:2, layer.own].unbind(), share))
    return buffer, Statistics(mean, var, share)


class _Features(NamedTuple):
    """The buffer, its channels' statistics, norm2's vectors of all layers, and memory for a
    normalised prefix."""

    buffer: Tensor  # [N, C, H, W]
    mean: Tensor  # [C]
    var: Tensor  # [C]
    widths: Tensor  # [4, width of all conv1 together]
    scratch: Tensor  # [N*H*W * most inputs]
    share: Share

    @classmethod
    def of(
        cls, layers: Sequence[_Layer], share: Share, buffer: Tensor, *vectors: Tensor
    ) -> _Features:
        scratch = buffer.new_empty(share.pixels * layers[-1].inputs)
        return cls(buffer, *vectors, scratch, share)

    def bn1(self, layer: _Layer, weight: Tensor | None, bias: Tensor | None) -> BatchNormParams:
        prefix = slice(0, layer.inputs)
        return BatchNormParams(weight, bias, self.mean[prefix], self.var[prefix], layer.eps[0])

    def normalised(self, layer: _Layer, bn1: BatchNormParams) -> Tensor:
        """``relu(norm1(prefix))``, in the scratch memory."""
        prefix = self.buffer[:, : layer.inputs]
        return passes.apply(prefix, bn1, "relu", channels_last_view(self.scratch, prefix.shape))

    def keep_statistics(self, channels: slice) -> None:
        own = self.buffer[:, channels]
        self.share.statistics(own, self.mean[channels], self.var[channels])


class _BufferGradient:
    """The gradient in the features, summed over the readers of each channel:
    ``total + (buffer - mean) * slope + offset``."""

    def __init__(self, features: _Features, grad: Tensor) -> None:
        self.features, buffer = features, features.buffer
        self.total = new_map(buffer, dtype=passes.wide_dtype(buffer))
        self.total.copy_(grad)
        self.sums = self.total.new_zeros(2, buffer.shape[1])  # slope and offset

    def add(self, d_u: Tensor, layer: _Layer, bn1: BatchNormParams) -> tuple[Tensor, Tensor]:
        """Add what flows through norm1 and its ReLU; the gradients of norm1's weight and bias."""
        if not passes.is_pixel_matrix(d_u):
            d_u = channels_last(d_u)
        prefix = slice(0, layer.inputs)
        slope, offset = self.sums[:, prefix]
        x, total = self.features.buffer[:, prefix], self.total[:, prefix]
        return passes.reduce(d_u, x, bn1, "relu", (slope, offset), total)

    def finished(self, channels: slice) -> Tensor:
        """The gradient of channels whose readers have all been added."""
        x = self.features.buffer[:, channels]
        out = new_map(x)
        sums = self.sums[:, channels]
        if (join := self.features.share.joins()) is not None:
            sums = join(sums.clone())
        mean, total = self.features.mean[channels], self.total[:, channels]
        return passes.input_gradient(total, x, mean, *sums, out)


class _DenseBlock(torch.autograd.Function):
    """Saves x's place, the buffer (its output), the statistics, conv1's outputs and the
    parameters."""

    @staticmethod
    def forward(ctx, x, layers, share, keep, *tensors):
        ctx.set_materialize_grads(False)
        N, inputs, H, W = x.shape
        total, width = layers[-1].outputs.stop, layers[-1].own.stop
        buffer = new_map(x, (N, total, H, W))
        buffer[:, :inputs].copy_(x)
        mean, var = (torch.empty(total, dtype=passes.wide_dtype(x), device=x.device) for _ in "mv")
        widths = mean.new_empty(4, width)
        features = _Features.of(layers, share, buffer, mean, var, widths)
        features.keep_statistics(slice(0, inputs))
        kept = []
        with autocast_disabled(x):
            for index, layer in enumerate(layers):
                weight1, bias1, conv1, conv1_bias, weight2, bias2, conv2, conv2_bias = _own(
                    tensors, index
                )
                u = features.normalised(layer, features.bn1(layer, weight1, bias1))
                a = convolve(u, conv1, conv1_bias, layer.geometry[0])
                v = new_map(a) if keep else a
                own = widths[:, layer.own]
                if share.group is not None:
                    share.statistics(a, own[0], own[1])
                affine, eps = (weight2, bias2), layer.eps[1]
                normalise(a, affine, None, share, eps, "relu", None, own, v)
                buffer[:, layer.outputs].copy_(convolve(v, conv2, conv2_bias, layer.geometry[1]))
                features.keep_statistics(layer.outputs)
                if keep and not layer.recompute:
                    kept.append(a)
        ctx.layers, ctx.share, ctx.kept = layers, share, len(kept)
        if keep:
            linked = x if ctx.needs_input_grad[0] else None
            ctx.save_for_backward(linked, buffer, mean, var, widths, *kept, *tensors)
        ctx.mark_non_differentiable(mean, var, widths)
        return buffer, mean, var, widths

    @staticmethod
    @without_gradient
    def backward(ctx, grad, *_):
        linked, buffer, mean, var, widths, *saved = ctx.saved_tensors
        kept, tensors = saved[: ctx.kept], saved[ctx.kept :]
        needs_x, _, _, _, *needs = ctx.needs_input_grad
        if needs_stock(grad):
            ctx.share.refuse_second_derivatives()
            x = place.filled(linked, buffer.detach()[:, : ctx.layers[0].inputs].clone())
            return _stock_gradients(ctx.layers, x, tensors, (needs_x, *needs), grad)
        features = _Features.of(ctx.layers, ctx.share, channels_last(buffer), mean, var, widths)
        gradient = _BufferGradient(features, grad)
        grads = []
        with autocast_disabled(buffer):
            for index in reversed(range(len(ctx.layers))):
                layer, own, need = ctx.layers[index], _own(tensors, index), _own(needs, index)
                a = None if layer.recompute else kept.pop()
                below = needs_x or any(needs[: PER_LAYER * index])
                if not below and not any(need):
                    grads.append([None] * PER_LAYER)
                    continue
                found = _layer_backward(layer, features, gradient, own, a, need, below)
                grads.append(
                    [
                        d.to(tensor.dtype) if wanted and tensor is not None else None
                        for d, tensor, wanted in zip(found, own, need, strict=True)
                    ]
                )
            d_x = gradient.finished(slice(0, ctx.layers[0].inputs)) if needs_x else None
        return d_x, None, None, None, *(d for layer in reversed(grads) for d in layer)


def _stock_gradients(
    layers: Sequence[_Layer], x: Tensor, tensors: Sequence[Tensor | None], needs: Sequence[bool],
    grad: Tensor,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """What backward returns, by stock operations."""

    def norm_relu_conv(
        x: Tensor, norm: tuple, eps: float, weight: Tensor, bias: Tensor | None, geometry: Geometry
    ) -> Tensor:
        u = F.relu(F.batch_norm(x, None, None, *norm, True, 0.0, eps))
        return F.conv2d(u, weight.to(x.dtype), to_dtype(bias, x.dtype), *geometry)

    def compute(features: Tensor, *tensors: Tensor | None) -> tuple[Tensor]:
        for index, layer in enumerate(layers):
            weight1, bias1, *conv1, weight2, bias2, conv2, conv2_bias = _own(tensors, index)
            (eps1, eps2), (geometry1, geometry2) = layer.eps, layer.geometry
            a = norm_relu_conv(features, (weight1, bias1), eps1, *conv1, geometry1)
            new = norm_relu_conv(a, (weight2, bias2), eps2, conv2, conv2_bias, geometry2)
            features = torch.cat([features, new], 1)
        return (features,)

    with autocast_disabled(x):
        d_x, *others = stock_gradients(compute, (x, *tensors), needs, (grad,))
    return d_x, None, None, None, *others


def _layer_backward(
    layer: _Layer, features: _Features, gradient: _BufferGradient,
    tensors: Sequence[Tensor | None], a: Tensor | None, need: Sequence[bool], below: bool,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """The gradients of the layer's tensors that ``need`` asks for; adds to ``gradient`` what the
    layer's inputs get, where something ``below`` needs it. ``a`` is conv1's output, if kept."""
    weight1, bias1, conv1, conv1_bias, _, _, conv2, _ = tensors
    bn1 = features.bn1(layer, weight1, bias1)
    norm2 = (features.widths[:, layer.own], layer.eps[1], "relu")
    u = features.normalised(layer, bn1)
    a = convolve(u, conv1, conv1_bias, layer.geometry[0]) if a is None else channels_last(a)
    v = passes.recompute(a, *norm2, None, new_map(a))
    d_v, *d_conv2 = convolution_backward(
        gradient.finished(layer.outputs), v, conv2, layer.geometry[1],
        (below or any(need[:6]), *need[6:]),
    )  # fmt: skip
    d_norm1 = d_norm2 = d_conv1 = (None, None)
    if d_v is not None:
        d_a = new_map(a)
        join = features.share.joins()
        d_norm2 = norm_backward(d_v, a, *norm2, d_a, join=join)[0][:2]
        d_u, *d_conv1 = convolution_backward(
            d_a, u, conv1, layer.geometry[0], (below or any(need[:2]), *need[2:4])
        )
        if d_u is not None:
            d_norm1 = gradient.add(d_u, layer, bn1)
    return (*d_norm1, *d_conv1, *d_norm2, *d_conv2)


def _own(values: Sequence, index: int) -> Sequence:
    """Those of the PER_LAYER values of each layer that are of layer ``index``."""
    return values[PER_LAYER * index :][:PER_LAYER]
