"""Max pool, average pool, and the mean over all pixels."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from cvkernels.freeze.graph import Node, Op, Run, Step
from cvkernels.freeze.ops.convolution import ConvPool, Scratch
from cvkernels.ops.avg_pool import op as avg_pool
from cvkernels.ops.common.norm import BatchNormParams
from cvkernels.ops.common.plan import Plan
from cvkernels.ops.common.pool import Window, window_count
from cvkernels.ops.max_pool import op as max_pool
from cvkernels.ops.squeeze_excite import squeeze as squeeze_op

if TYPE_CHECKING:
    from cvkernels.freeze.lower import Lowered
    from cvkernels.freeze.steps import Site


class Pool(Op, writes=True, placeable=True):
    """A pool; ``window`` has the fields of :class:`cvkernels.ops.common.pool.Window`."""

    def shape(self, node: Node, x: tuple) -> tuple:
        node.check(len(x) == 4, "[N, C, H, W]", x)
        window = Window(*self.window)
        size = tuple(window_count(self.name, x[2 + axis], axis, window) for axis in range(2))
        node.check(min(size) > 0, "a larger map for its window", x)
        return (*x[:2], *size)


class MaxPool(Pool, name="max_pool", runs_plans=True):
    """A max pool; behind a convolution that runs image by image, a part of its step."""

    window: tuple

    def lower(self, node: Node, lowered: Lowered) -> Step:
        conv = lowered.of[node.inputs[0]]
        if not isinstance(conv.op, Scratch):
            return lowered.emit(self, node)
        return lowered.emit(
            ConvPool(conv.op.planned, self.window), node.inputs[0], [*conv.inputs, conv],
            lowered.values[node], backend=conv.op.planned.chosen.name,
        )  # fmt: skip

    def build(self, site: Site) -> Run:
        return _written(site, max_pool.plan, *self.window)


def _written(site: Site, make: Callable[..., Plan], *window: Any, **options: Any) -> Run:
    (x,) = site.inputs
    pool = site.plan(make, site.like(x), *window, out=site.like(site.out), **options)
    return site.written(lambda env, y: pool(env[x], y))


class _Average(Op, runs_plans=True):
    """Averages of x, or with an ``input_affine`` (scale, shift) of ``relu(x * scale + shift)``."""

    def averaged(self, site: Site, *arguments: Any) -> Run:
        """A step that runs avg_pool with these arguments after x."""
        bn = None if self.input_affine is None else BatchNormParams(*self.input_affine)
        return _written(site, avg_pool.plan, *arguments, input_bn=bn)


class AvgPool(_Average, Pool, name="avg_pool"):
    """An average pool with the options of torch.nn.functional.avg_pool2d."""

    window: tuple
    count_include_pad: bool
    divisor: int | None
    input_affine: tuple[Tensor, Tensor] | None = None

    def build(self, site: Site) -> Run:
        kernel_size, stride, padding, _, ceil_mode = self.window
        options = (ceil_mode, self.count_include_pad, self.divisor)
        return self.averaged(site, kernel_size, stride, padding, *options)


class Mean(_Average, name="mean"):
    """The mean of each channel of x over all pixels, [N, C, 1, 1]."""

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
        squeeze = site.plan(squeeze_op.plan, site.like(x))
        return site.computed(lambda env: squeeze(env[x]).view(shape))
