"""Training a dense block on one feature buffer, and a norm, ReLU and pool that keep their input.

What autograd keeps of a block grows linearly with its layers: the buffer, each layer's conv1 output
(nothing with ``memory_efficient``) and the batch statistics, which each channel has once, from when
it is written, for all norms that read it. The backward pass computes norm and ReLU again from
these; running statistics are not touched there. The gradients of a channel's readers are summed in
one buffer, in float32 (float64 for float64). Huang et al. 2017, arXiv:1608.06993; the shared
storage is Pleiss et al. 2017's, arXiv:1707.06990.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cvkernels.functional import BatchNormParams, avg_pool, max_pool
from cvkernels.ops.batch_norm_act import passes
from cvkernels.ops.batch_norm_act.op import norm_backward, refuse_create_graph


class Statistics(NamedTuple):
    """Mean and biased variance of each channel of a map."""

    mean: Tensor
    var: Tensor


class Geometry(NamedTuple):
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int

    @classmethod
    def of(cls, conv: nn.Conv2d) -> Geometry:
        return cls(conv.stride, conv.padding, conv.dilation, conv.groups)


class LayerPlan(NamedTuple):
    """What a layer computes by, but for its tensors."""

    inputs: int
    width: int
    outputs: int
    eps: tuple[float, float]
    geometry: tuple[Geometry, Geometry]
    recompute: bool


# Tensors of a layer, in order: weight and bias of norm1, conv1, norm2 and conv2.
PER_LAYER = 8


def tensors_of(parts: Sequence[nn.Module]) -> list[Tensor | None]:
    return [tensor for part in parts for tensor in (part.weight, part.bias)]


def plan_of(
    norm1: nn.Module, conv1: nn.Conv2d, norm2: nn.Module, conv2: nn.Conv2d, recompute: bool
):
    return LayerPlan(
        conv1.in_channels, conv1.out_channels, conv2.out_channels, (norm1.eps, norm2.eps),
        (Geometry.of(conv1), Geometry.of(conv2)), recompute,
    )  # fmt: skip


def run_block(
    x: Tensor, layers: Sequence[tuple[nn.Module, ...]], recompute: Sequence[bool]
) -> tuple[Tensor, Statistics]:
    """The block's output on x and the statistics of its channels; ``layers`` hold (norm1, conv1,
    norm2, conv2). Running statistics are updated at the end, so that an error leaves them alone.
    """
    plans = [plan_of(*parts, again) for parts, again in zip(layers, recompute, strict=True)]
    tensors = [tensor for parts in layers for tensor in tensors_of(parts)]
    grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *tensors))
    buffer, mean, var, widths = _DenseBlock.apply(plans, grad, x, *tensors)
    pixels = x.numel() // x.shape[1]
    norms, start = [], 0
    for plan, (norm1, _, norm2, _) in zip(plans, layers, strict=True):
        stop = start + plan.width
        norms.append((norm1, mean[: plan.inputs], var[: plan.inputs]))
        norms.append((norm2, *widths[:2, start:stop].unbind()))
        start = stop
    for norm, *statistics in norms:
        update_running(norm, Statistics(*statistics), pixels)
    return buffer, Statistics(mean, var)


def counted(norm: nn.Module) -> passes.Running | None:
    """Count a batch as ``norm.forward`` does in training; the running statistics that it moves."""
    if not norm.track_running_stats or norm.running_mean is None:
        return None
    factor = norm.momentum
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if factor is None:
            factor = 1.0 / float(norm.num_batches_tracked)
    return passes.Running(norm.running_mean, norm.running_var, factor or 0.0)


@torch.no_grad()
def update_running(norm: nn.Module, batch: Statistics, pixels: int) -> None:
    """What ``norm.forward`` does to its buffers in training."""
    if (running := counted(norm)) is None:
        return
    factor = running.factor
    for running, new in (
        (norm.running_mean, batch.mean),
        (norm.running_var, batch.var * (pixels / (pixels - 1))),
    ):
        if running.dtype == new.dtype:
            running.lerp_(new, factor)
        else:
            running.copy_(torch.lerp(running.to(new.dtype), new, factor))


class _DenseBlock(torch.autograd.Function):
    """Saves the buffer (its output), the statistics, conv1's outputs and the parameters."""

    @staticmethod
    def forward(ctx, plans, grad, x, *tensors):
        N, inputs, H, W = x.shape
        total = inputs + sum(plan.outputs for plan in plans)
        buffer = _map(x, (N, total, H, W))
        buffer[:, :inputs].copy_(x)
        mean, var = (torch.empty(total, dtype=passes.wide_dtype(x), device=x.device) for _ in "mv")
        width = sum(plan.width for plan in plans)
        widths = mean.new_empty(4, width)
        passes.statistics(buffer[:, :inputs], (mean[:inputs], var[:inputs]))
        scratch = x.new_empty(N * H * W * max(plan.inputs for plan in plans))
        kept, start = [], 0
        with as_it_is(x):
            for plan, layer in zip(plans, _by_layer(tensors), strict=True):
                weight1, bias1, conv1, conv1_bias, weight2, bias2, conv2, conv2_bias = layer
                now, stop = plan.inputs, plan.inputs + plan.outputs
                bn1 = BatchNormParams(weight1, bias1, mean[:now], var[:now], plan.eps[0])
                u = passes.apply(
                    buffer[:, :now], bn1, "relu", channels_last_view(scratch, (N, now, H, W))
                )
                a = convolve(u, conv1, conv1_bias, plan.geometry[0])
                own = slice(start, start + plan.width)
                v = torch.empty_like(a) if grad else a
                norm2 = (weight2, bias2, None, plan.eps[1])
                passes.forward(a, *norm2, "relu", None, widths[:, own], v)
                buffer[:, now:stop].copy_(convolve(v, conv2, conv2_bias, plan.geometry[1]))
                passes.statistics(buffer[:, now:stop], (mean[now:stop], var[now:stop]))
                if grad and not plan.recompute:
                    kept.append(a)
                start = own.stop
        ctx.plans, ctx.kept = plans, len(kept)
        if grad:
            ctx.save_for_backward(buffer, mean, var, widths, *kept, *tensors)
        ctx.mark_non_differentiable(mean, var, widths)
        return buffer, mean, var, widths

    @staticmethod
    def backward(ctx, grad, *_):
        refuse_create_graph("DenseBlock in training")
        buffer, mean, var, widths, *saved = ctx.saved_tensors
        kept, tensors = saved[: ctx.kept], saved[ctx.kept :]
        buffer = buffer.contiguous(memory_format=torch.channels_last)
        N, _, H, W = buffer.shape
        plans, (_, _, x_needs, *needs) = ctx.plans, ctx.needs_input_grad
        total = _map(buffer, buffer.shape, passes.wide_dtype(buffer))
        total.copy_(grad)
        slope, offset = passes.vector_like(buffer, True), passes.vector_like(buffer, True)
        scratch = buffer.new_empty(N * H * W * max(plan.inputs for plan in plans))
        start, grads = widths.shape[1], []

        def finished(first: int, last: int) -> Tensor:
            """The gradient of channels that no other layer reads."""
            out = _map(buffer, (N, last - first, H, W))
            own = slice(first, last)
            vectors = (mean[own], slope[own], offset[own])
            return passes.input_gradient(total[:, own], buffer[:, own], *vectors, out)

        with as_it_is(buffer):
            for index in reversed(range(len(plans))):
                plan, need = plans[index], needs[PER_LAYER * index :][:PER_LAYER]
                if not x_needs and not any(needs[: PER_LAYER * (index + 1)]):
                    grads.append([None] * PER_LAYER)
                    continue
                own_tensors = tensors[PER_LAYER * index :][:PER_LAYER]
                weight1, bias1, conv1, conv1_bias, _, _, conv2, _ = own_tensors
                now, start = plan.inputs, start - plan.width
                prefix, own = buffer[:, :now], slice(start, start + plan.width)
                bn1 = BatchNormParams(weight1, bias1, mean[:now], var[:now], plan.eps[0])
                norm2 = (widths[:, own], plan.eps[1], "relu")
                below = x_needs or any(needs[: PER_LAYER * index])
                u = passes.apply(prefix, bn1, "relu", channels_last_view(scratch, (N, now, H, W)))
                if plan.recompute:
                    a = convolve(u, conv1, conv1_bias, plan.geometry[0])
                else:
                    a = kept.pop().contiguous(memory_format=torch.channels_last)
                v = passes.again(a, *norm2, None, torch.empty_like(a))
                d_v, *d_conv2 = convolution_backward(
                    finished(now, now + plan.outputs), v, conv2, plan.geometry[1],
                    (below or any(need[:6]), *need[6:]),
                )  # fmt: skip
                d_norm1 = d_norm2 = d_conv1 = (None, None)
                if d_v is not None:
                    d_a = torch.empty_like(a)
                    d_norm2 = norm_backward(d_v, a, *norm2, d_a)[0][:2]
                    d_u, *d_conv1 = convolution_backward(
                        d_a, u, conv1, plan.geometry[0], (below or any(need[:2]), *need[2:4])
                    )
                    if d_u is not None:
                        if not passes.is_pixel_matrix(d_u):
                            d_u = d_u.contiguous(memory_format=torch.channels_last)
                        sums = (slope[:now], offset[:now])
                        d_norm1 = passes.reduce(d_u, prefix, bn1, "relu", sums, total[:, :now])
                layer = (*d_norm1, *d_conv1, *d_norm2, *d_conv2)
                grads.append(
                    [
                        d.to(tensor.dtype) if wanted and tensor is not None else None
                        for d, tensor, wanted in zip(layer, own_tensors, need, strict=True)
                    ]
                )
            d_x = finished(0, plans[0].inputs) if x_needs else None
        return None, None, d_x, *(d for layer in reversed(grads) for d in layer)


def as_it_is(x: Tensor) -> contextlib.AbstractContextManager:
    """No autocast: operands have been given their dtypes."""
    device = x.device.type
    if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):
        return contextlib.nullcontext()
    return torch.autocast(device, enabled=False)


def _by_layer(tensors: Sequence[Tensor | None]) -> list[Sequence[Tensor | None]]:
    return [tensors[i : i + PER_LAYER] for i in range(0, len(tensors), PER_LAYER)]


def _map(like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(
        shape, dtype=dtype or like.dtype, device=like.device, memory_format=torch.channels_last
    )


def channels_last_view(memory: Tensor, shape: Sequence[int]) -> Tensor:
    """A channels_last tensor of ``shape`` in the memory of a flat one."""
    N, C, H, W = shape
    return memory.as_strided(shape, (H * W * C, 1, W * C, C))


# Pixels of a map up to which, on CPU, a matrix product is faster than oneDNN's 1x1 convolution; of
# few channels it always is.
SMALL_MAP = 14 * 14
FEW_CHANNELS = 32


def _is_product(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> bool:
    """Whether the convolution is run as one matrix product."""
    if not x.is_cpu or bias is not None or weight.shape[2:] != (1, 1):
        return False
    if geometry != Geometry((1, 1), (0, 0), (1, 1), 1):
        return False
    return _is_small(x) or min(weight.shape[:2]) < FEW_CHANNELS


def _is_small(x: Tensor) -> bool:
    return x.shape[2] * x.shape[3] <= SMALL_MAP


def _matrix(x: Tensor) -> Tensor:
    """A dense channels_last map as [pixels, C], or a 1x1 weight as [outputs, inputs]."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    if _is_product(x, weight, bias, geometry):
        y = _map(x, (x.shape[0], weight.shape[0], *x.shape[2:]))
        torch.mm(_matrix(x), _matrix(weight.to(x.dtype)).t(), out=_matrix(y))
        return y
    bias = None if bias is None else bias.to(x.dtype)
    y = F.conv2d(x, weight.to(x.dtype), bias, *geometry)
    return y.contiguous(memory_format=torch.channels_last)


def convolution_backward(
    grad: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, needed: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients in x, weight and bias, those of the three needed."""
    d_x = d_weight = None
    if not needed[2] and _is_product(x, weight, None, geometry):
        if needed[0]:
            d_x = torch.empty_like(x)
            torch.mm(_matrix(grad), _matrix(weight.to(x.dtype)), out=_matrix(d_x))
        if needed[1] and _is_small(x):
            d_weight = _sum_of_products(_matrix(grad), _matrix(x)).view(weight.shape)
        needed = (False, needed[1] and d_weight is None, False)
    if not any(needed):
        return d_x, d_weight, None
    stride, padding, dilation, groups = geometry
    bias_sizes = [weight.shape[0]] if needed[2] else None
    others = torch.ops.aten.convolution_backward(
        grad, x, weight.to(x.dtype), bias_sizes, stride, padding, dilation, False, [0, 0], groups,
        list(needed),
    )  # fmt: skip
    return d_x if others[0] is None else others[0], *others[1:]


def _sum_of_products(a: Tensor, b: Tensor) -> Tensor:
    """``a.T @ b``, summed in parts: the product's own sum errs twice as much as oneDNN's."""
    parts = min(4, max(1, a.shape[0] // 64))
    rows = -(-a.shape[0] // parts)
    (first, second), *others = zip(a.split(rows), b.split(rows), strict=True)
    total = torch.mm(first.t(), second)
    for first, second in others:
        total.addmm_(first.t(), second)
    return total


def run_norm_relu_pool(
    x: Tensor, norm: nn.Module, pool: nn.Module, statistics: Statistics | None = None
) -> Tensor:
    """``pool(relu(norm(x)))`` in x's layout; keeps x, channels_last, and its statistics, which are
    computed where not given."""
    layout = torch.contiguous_format if x.is_contiguous() else torch.channels_last
    x = x.contiguous(memory_format=torch.channels_last)
    if statistics is None:
        statistics = Statistics(*passes.statistics(x.detach()))
    y = _NormReluPool.apply(x, norm.weight, norm.bias, *statistics, norm.eps, _pooling(pool))
    update_running(norm, statistics, x.numel() // x.shape[1])
    # What draws random numbers in memory order behind it draws stock's.
    return y.contiguous(memory_format=layout)


class _Pooling(NamedTuple):
    """``forward(x, bn)``, and ``backward(grad, x, bn)`` to the gradient behind norm and ReLU."""

    forward: Callable[[Tensor, BatchNormParams], Tensor]
    backward: Callable[[Tensor, Tensor, BatchNormParams], Tensor]


def _pooling(pool: nn.MaxPool2d | nn.AvgPool2d) -> _Pooling:
    if isinstance(pool, nn.AvgPool2d):
        window = (pool.kernel_size, pool.stride, 0, pool.ceil_mode)
        return _Pooling(
            lambda x, bn: avg_pool(x, *window, input_bn=bn),
            lambda grad, x, bn: torch.ops.aten.avg_pool2d_backward(
                grad, x, _pair(pool.kernel_size), _pair(pool.stride), [0, 0], pool.ceil_mode,
                pool.count_include_pad, None,
            ),
        )  # fmt: skip
    window = (pool.kernel_size, pool.stride, pool.padding, pool.dilation, pool.ceil_mode)

    def normalised(x: Tensor, bn: BatchNormParams) -> Tensor:
        return passes.apply(x, bn, "relu", torch.empty_like(x, memory_format=torch.channels_last))

    def backward(grad: Tensor, x: Tensor, bn: BatchNormParams) -> Tensor:
        y, sizes = normalised(x, bn), [_pair(size) for size in window[:4]]
        _, indices = torch.ops.aten.max_pool2d_with_indices(y, *sizes, pool.ceil_mode)
        return torch.ops.aten.max_pool2d_with_indices_backward(
            grad, y, *sizes, pool.ceil_mode, indices
        )

    return _Pooling(lambda x, bn: max_pool(normalised(x, bn), *window), backward)


def _pair(value: int | Sequence[int]) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)


class _NormReluPool(torch.autograd.Function):
    """Saves x, the norm's weight and bias, and the statistics."""

    @staticmethod
    def forward(ctx, x, weight, bias, mean, var, eps, pooling):
        ctx.save_for_backward(x, weight, bias, mean, var)
        ctx.eps, ctx.pooling = eps, pooling
        with as_it_is(x):
            return pooling.forward(x, BatchNormParams(weight, bias, mean, var, eps))

    @staticmethod
    def backward(ctx, grad):
        refuse_create_graph("DenseNet in training")
        x, weight, bias, mean, var = ctx.saved_tensors
        x = x.contiguous(memory_format=torch.channels_last)
        bn = BatchNormParams(weight, bias, mean, var, ctx.eps)
        with as_it_is(x):
            grad = grad.contiguous(memory_format=torch.channels_last)
            d_y = ctx.pooling.backward(grad, x, bn)
            d_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
            vectors = passes.vectors_of(bn, x)
            (d_weight, d_bias, *_), _ = norm_backward(d_y, x, vectors, ctx.eps, "relu", d_x)
            d_vectors = [
                None if vector is None else d.to(vector.dtype)
                for d, vector in ((d_weight, weight), (d_bias, bias))
            ]
        return d_x, *d_vectors, None, None, None, None
