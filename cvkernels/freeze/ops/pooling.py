"""Pooling."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cvkernels import functional
from cvkernels.freeze.graph import Node, Op, Run, Step
from cvkernels.freeze.ops.convolution import Scratch
from cvkernels.ops.common.affine import NO_VECTORS
from cvkernels.ops.common.norm import BatchNormParams
from cvkernels.ops.common.pool import Window, window_count
from cvkernels.ops.common.traffic import Traffic, touched_positions

if TYPE_CHECKING:
    from cvkernels.freeze.lower import Lowered
    from cvkernels.freeze.memory import Memory
    from cvkernels.freeze.steps import Site


class _Pool(Op, writes=True, placeable=True):
    """``window`` has the options in the order of :class:`cvkernels.ops.common.pool.Window`."""

    def shape(self, node: Node, x: tuple) -> tuple:
        node.check(len(x) == 4, "[N, C, H, W]", x)
        window = Window(*self.window)
        size = tuple(window_count(self.name, x[2 + axis], axis, window) for axis in range(2))
        node.check(min(size) > 0, "a larger map for its window", x)
        return (*x[:2], *size)

    def traffic(self, step: Step, memory: Memory) -> Traffic:
        """Of the input, the pixels that some window reads."""
        every, x = super().traffic(step, memory), step.inputs[0].value
        axes = zip(x.shape[2:], *self.window[:4], step.value.shape[2:], strict=True)
        touched = math.prod(touched_positions(*axis) for axis in axes)
        skipped = math.prod(x.shape[2:]) - touched
        read = every.bytes_read - x.shape[0] * x.shape[1] * skipped * x.dtype.itemsize
        return every._replace(bytes_read=read)


class MaxPool(_Pool, name="max_pool", kernel="max_pool_out"):
    window: tuple

    def lower(self, node: Node, lowered: Lowered) -> Step:
        conv = lowered.of[node.inputs[0]]
        if not isinstance(conv.op, Scratch):
            return lowered.emit(self, node)
        return lowered.emit(
            conv.op.pooled(self.window), node.inputs[0], [*conv.inputs, conv],
            lowered.values[node], backend=conv.op.planned.implementation.name,
        )  # fmt: skip

    def build(self, site: Site) -> Run:
        (x,), window = site.inputs, self.window
        if (write := site.kernel) is not None:
            return site.written(lambda env, y: write(env[x], *window, y))
        return site.written(lambda env, y: functional.max_pool(env[x], *window, out=y))


class _Average(Op, kernel="avg_pool_out"):
    """Averages of ``relu(x * scale + shift)``, where there is an ``input_affine``, or of x."""

    def averaged(self, site: Site, *arguments: Any) -> Run:
        """With the window's options in the order of avg_pool's."""
        (x,), norm = site.inputs, self.input_affine
        if (write := site.kernel) is not None:
            vectors = NO_VECTORS if norm is None else (*norm, None, None, 0.0)
            return site.written(lambda env, y: write(env[x], *arguments, *vectors, y))
        options = {"input_bn": None if norm is None else BatchNormParams(*norm)}
        return site.written(
            lambda env, y: functional.avg_pool(env[x], *arguments, **options, out=y)
        )


class AvgPool(_Average, _Pool, name="avg_pool"):
    window: tuple
    count_include_pad: bool
    divisor: int | None
    input_affine: tuple[Tensor, Tensor] | None = None

    def build(self, site: Site) -> Run:
        kernel_size, stride, padding, _, ceil_mode = self.window
        options = (ceil_mode, self.count_include_pad, self.divisor)
        return self.averaged(site, kernel_size, stride, padding, *options)


class Mean(_Average, name="mean"):
    """The mean of x over its pixels, [N, C, 1, 1]."""

    input_affine: tuple[Tensor, Tensor] | None = None

    @property
    def writes(self) -> bool:
        return self.input_affine is not None

    def shape(self, node: Node, x: tuple) -> tuple:
        return (*x[:2], 1, 1)

    def build(self, site: Site) -> Run:
        if self.input_affine is not None:
            size = site.step.inputs[0].value.shape[2:]
            return self.averaged(site, size, size, (0, 0), False, True, None)
        (x,), shape = site.inputs, site.step.value.shape
        if site.kernel is not None:
            squeeze = torch.ops.cvkernels.squeeze_native.default
            return site.computed(lambda env: squeeze(env[x]).view(shape))
        return site.computed(lambda env: env[x].mean((2, 3), keepdim=True))
