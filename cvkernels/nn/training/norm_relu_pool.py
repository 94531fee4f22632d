"""Norm, ReLU and average pool in training, as one function that keeps its input alone."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cvkernels.functional import BatchNormParams, avg_pool
from cvkernels.nn.training.batch_norm import Statistics, update_running
from cvkernels.ops.batch_norm_act import passes
from cvkernels.ops.batch_norm_act.op import norm_backward
from cvkernels.ops.common.autograd import autocast_disabled, without_gradient
from cvkernels.ops.common.differentiable import needs_stock, stock_gradients
from cvkernels.ops.common.layout import channels_last
from cvkernels.ops.common.pool import Window, window_of
from cvkernels.ops.common.recycled import new_map


def norm_relu_avg_pool(
    x: Tensor, norm: nn.Module, pool: nn.AvgPool2d, statistics: Statistics | None = None
) -> Tensor:
    """``pool(relu(norm(x)))`` in x's layout, for a pool without padding or divisor of its own.

    Autograd keeps x, channels_last, and its statistics, which are computed where not given.
    """
    layout = torch.contiguous_format if x.is_contiguous() else torch.channels_last
    x = channels_last(x)
    statistics = statistics or Statistics.of(norm, x)
    window = window_of("avg_pool", pool.kernel_size, pool.stride, 0, 1, pool.ceil_mode)
    y = _NormReluAvgPool.apply(x, norm.weight, norm.bias, statistics, norm.eps, window)
    update_running(norm, statistics)
    return y.contiguous(memory_format=layout)


class _NormReluAvgPool(torch.autograd.Function):
    """Saves x, the norm's weight and bias, and the statistics."""

    @staticmethod
    def forward(ctx, x, weight, bias, batch: Statistics, eps, window: Window):
        ctx.set_materialize_grads(False)
        mean, var, ctx.share = batch
        ctx.save_for_backward(x, weight, bias, mean, var)
        ctx.eps, ctx.window = eps, window
        kernel_size, stride, _, _, ceil_mode = window
        with autocast_disabled(x):
            bn = BatchNormParams(weight, bias, mean, var, eps)
            return avg_pool(x, kernel_size, stride, 0, ceil_mode, input_bn=bn)

    @staticmethod
    @without_gradient
    def backward(ctx, grad):
        x, weight, bias, mean, var = ctx.saved_tensors
        kernel_size, stride, padding, _, ceil_mode = ctx.window
        if needs_stock(grad):
            ctx.share.refuse_second_derivatives()

            def compute(x, *affine):
                y = F.relu(F.batch_norm(x, None, None, *affine, True, 0.0, ctx.eps))
                return (F.avg_pool2d(y, kernel_size, stride, padding, ceil_mode),)

            with autocast_disabled(x):
                inputs, needs = (x, weight, bias), ctx.needs_input_grad[:3]
                return *stock_gradients(compute, inputs, needs, (grad,)), None, None, None
        x = channels_last(x)
        with autocast_disabled(x):
            d_y = torch.ops.aten.avg_pool2d_backward(
                channels_last(grad), x, kernel_size, stride, padding, ceil_mode, True, None
            )
            d_x = new_map(x) if ctx.needs_input_grad[0] else None
            vectors = passes.vectors_of(BatchNormParams(weight, bias, mean, var, ctx.eps), x)
            join = ctx.share.joins()
            d_vectors, _ = norm_backward(d_y, x, vectors, ctx.eps, "relu", d_x, join=join)
        grads = (
            None if vector is None else d.to(vector.dtype)
            for d, vector in zip(d_vectors, (weight, bias), strict=False)
        )
        return d_x, *grads, None, None, None
