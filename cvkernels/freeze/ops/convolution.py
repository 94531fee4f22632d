"""Convolutions: those of a graph, and what a plan runs for them, some with a max pool behind."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cvkernels.freeze.backends import Backend, choose
from cvkernels.freeze.graph import Node, Op, Run, Step, TensorSpec
from cvkernels.freeze.ops.elementwise import Affine
from cvkernels.freeze.ops.squeeze_excite import Scale
from cvkernels.ops.common.norm import BatchNormParams
from cvkernels.ops.conv_bn_act import op as conv_bn_act
from cvkernels.ops.conv_bn_act.problem import Problem, Projection
from cvkernels.ops.depthwise_conv_bn_act import native as depthwise_native
from cvkernels.ops.depthwise_conv_bn_act import op as depthwise
from cvkernels.ops.max_pool import op as max_pool

if TYPE_CHECKING:
    from cvkernels.freeze.lower import Lowered
    from cvkernels.freeze.steps import Site


class Conv(Op, name="conv"):
    """``act((conv(prologue(x)) * scale + shift) * output_gate + residual)``, by conv_bn_act.

    The prologue is ``input_affine`` and a ReLU, or a multiplication by gates. With ``squeeze`` the
    convolution also sums its output over the pixels, and :class:`Sums` is the value of that.
    """

    weight: Tensor
    bias: Tensor | None
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    roles: tuple[str, ...] = ("x",)
    scale: Tensor | None = None
    shift: Tensor | None = None
    act: str = "none"
    input_affine: tuple[Tensor, Tensor] | None = None
    squeeze: bool = False
    # A 1x1 convolution that the residual gets before it is added.
    projection: Tensor | None = None
    projection_stride: tuple[int, int] = (1, 1)

    @property
    def bn(self) -> BatchNormParams | None:
        return None if self.scale is None else BatchNormParams(self.scale, self.shift)

    @property
    def input_bn(self) -> BatchNormParams | None:
        return None if self.input_affine is None else BatchNormParams(*self.input_affine)

    @property
    def is_plain(self) -> bool:
        """Whether nothing follows the convolution yet."""
        return self.act == "none" and "residual" not in self.roles

    @property
    def is_1x1(self) -> bool:
        sizes = (*self.weight.shape[2:], *self.stride, self.groups)
        return sizes == (1, 1, 1, 1, 1) and tuple(self.padding) == (0, 0)

    @property
    def is_depthwise(self) -> bool:
        channels, inputs = self.weight.shape[:2]
        return inputs == 1 and 1 < channels == self.groups

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of conv_bn_act that are the same in every call."""
        return {
            "weight": self.weight, "bias": self.bias, "bn": self.bn, "stride": self.stride,
            "padding": self.padding, "dilation": self.dilation, "groups": self.groups,
            "act": self.act, "input_bn": self.input_bn, "projection": self.projection,
            "projection_stride": self.projection_stride,
        }  # fmt: skip

    def problem(self, x: TensorSpec) -> Problem:
        """The problem that conv_bn_act solves on x, with all that the graph fused to the op."""
        K, _, R, S = self.weight.shape
        projection = None
        if self.projection is not None:
            stride = tuple(self.projection_stride)
            projection = Projection(self.projection.shape[1], (stride[0], stride[1]))
        return Problem(
            *x.shape, K, R, S, tuple(self.stride), tuple(self.padding), tuple(self.dilation),
            self.groups, x.dtype, self.act, has_bias=self.bias is not None,
            has_bn=self.scale is not None,
            has_residual="residual" in self.roles and projection is None,
            has_input_bn=self.input_affine is not None, has_input_gate="gate" in self.roles,
            has_output_gate="output_gate" in self.roles, projection=projection,
        )  # fmt: skip

    def bare(self) -> Conv:
        """The convolution without its prologue."""
        roles = tuple(role for role in self.roles if role != "gate")
        return replace(self, input_affine=None, roles=roles)

    def planned(
        self, x: TensorSpec, device: torch.device, table: Mapping[str, str], sliced: bool
    ) -> PlannedConv | Depthwise:
        """The op that runs the convolution on x; ``sliced`` if into a slice of a buffer.

        It is without the prologue where the chosen backend has none; steps before it compute that.
        """
        problem = self.problem(x)
        if self.is_depthwise:
            reason = depthwise_native.why_not(problem, device.type)
            if not reason or device.type != "cpu" or self.squeeze:
                return Depthwise(self, writes=not reason)
        chosen = choose(problem, device, table, sliced)
        alone = problem.has_prologue and not chosen.prologue
        return PlannedConv(self.bare() if alone else self, chosen)

    def shape(self, node: Node, x: tuple, *others: tuple) -> tuple:
        node.check(len(x) == 4, "[N, C, H, W]", x)
        K, channels, *kernel = self.weight.shape
        node.check(x[1] == channels * self.groups, f"{channels} channels", x)
        axes = zip(x[2:], kernel, self.stride, self.padding, self.dilation, strict=True)
        size = tuple((s + 2 * p - d * (k - 1) - 1) // stride + 1 for s, k, stride, p, d in axes)
        node.check(min(size) > 0, f"a larger map than {x[2]}x{x[3]} for its kernel", x)
        shape = (x[0], K, *size)
        if "residual" in self.roles:
            residual = others[self.roles.index("residual") - 1]
            if self.projection is not None:
                steps = zip(residual[2:], self.projection_stride, strict=True)
                residual = (residual[0], K, *((n - 1) // step + 1 for n, step in steps))
            node.check(residual == shape, f"a shortcut {shape}", x)
        return shape

    def lower(self, node: Node, lowered: Lowered) -> Step:
        planned = lowered.planned[node]
        if isinstance(planned, Depthwise):
            backend = "native" if planned.writes else "cvkernels"
            return lowered.emit(planned, node, backend=backend)
        inputs, x = lowered.inputs(node), lowered.values[node.inputs[0]]
        if planned.conv is not self:
            if self.input_affine is not None:
                affine = Affine(*self.input_affine, relu=True)
                inputs[0] = lowered.emit(affine, node, inputs[:1], x)
            if "gate" in self.roles:
                gate = inputs.pop(self.roles.index("gate"))
                inputs[0] = lowered.emit(Scale(), gate, [inputs[0], gate], x)
        if node in lowered.pooled:
            value = lowered.values[node]
            one = value._replace(shape=(1, *value.shape[1:]))
            return lowered.emit(Scratch(planned), node, inputs, one, backend="native")
        return lowered.emit(planned, node, inputs, backend=planned.chosen.name)


class PlannedConv(Op, name="conv", runs_plans=True, placeable=True):
    """A convolution, and the backend that runs it."""

    conv: Conv
    chosen: Backend

    @property
    def roles(self) -> tuple[str, ...]:
        return self.conv.roles

    @property
    def writes(self) -> bool:
        return self.chosen.writes

    def plan(
        self,
        site: Site,
        x: Tensor,
        residual: Tensor | None,
        gate: Tensor | None,
        out: Tensor | None,
        output_gate: Tensor | None = None,
        times: int = 1,
    ) -> Callable[..., Tensor]:
        """A function of (x, residual, gate, out, output_gate) that convolves tensors like these."""
        return site.plan(
            conv_bn_act.plan, x, **self.conv.arguments, residual=residual, input_gate=gate, out=out,
            output_gate=output_gate, cache=site.cache, implementation=self.chosen.implementation,
            times=times,
        )  # fmt: skip

    def build(self, site: Site) -> Run:
        x, residual, gate, output_gate = map(site.role, ("x", "residual", "gate", "output_gate"))
        number, out = site.number, site.out
        convolve = self.plan(site, *map(site.like, (x, residual, gate, out, output_gate)))

        def run(env: list) -> None:
            env[number] = convolve(env[x], env[residual], env[gate], env[out], env[output_gate])

        return run


class Scratch(Op, name="scratch", writes=True):
    """Memory for one image of the map between a convolution and its max pool, see ConvPool."""

    planned: PlannedConv


class ConvPool(Op, name="conv_pool", writes=True, placeable=True):
    """A convolution and the max pool behind it, computed one image after the other.

    The map between the two then has the size of one image, and is in the cache when it is pooled.
    """

    planned: PlannedConv
    window: tuple

    def build(self, site: Site) -> Run:
        (x, image), number = site.inputs, site.number
        images, between, pooled = site.like(x), site.like(image), site.like(number)
        times = len(images)
        convolve = self.planned.plan(site, images[:1], None, None, between, times=times)
        pool = site.plan(max_pool.plan, between, *self.window, out=pooled[:1], times=times)

        def run(env: list) -> None:
            between = env[image]
            for source, out in zip(env[x].split(1), env[number].split(1), strict=True):
                convolve(source, None, None, between)
                pool(between, out)

        return run


class Depthwise(Op, name="depthwise", runs_plans=True):
    """A depthwise convolution by depthwise_conv_bn_act, whose kernels apply the norm as well.

    ``writes`` is whether they write into memory that they are given.
    """

    conv: Conv
    writes: bool

    def build(self, site: Site) -> Run:
        (x,), sums, arguments = site.inputs, site.reader(Sums), self.conv.arguments
        for name in ("groups", "input_bn", "projection", "projection_stride"):
            del arguments[name]
        options = {"squeeze": self.conv.squeeze, "cache": site.cache}
        convolve = site.plan(depthwise.plan, site.like(x), **arguments, **options)
        if self.writes:
            return site.written(lambda env, y: convolve(env[x], y, env[sums]))

        def compute(env: list) -> Tensor:
            y, made = convolve(env[x])
            if made is not None:
                env[sums] = made
            return y

        return site.computed(compute)


class Sums(Op, name="sums"):
    """The sums over the pixels of a convolution with ``squeeze``; its step computes them."""

    writes: bool = False

    def infer(self, node: Node, inputs: list[TensorSpec], device: torch.device) -> TensorSpec:
        (x,) = inputs
        return TensorSpec(x.shape[:2], torch.float32 if x.dtype.itemsize < 4 else x.dtype)

    def lower(self, node: Node, lowered: Lowered) -> Step:
        conv = lowered.of[node.inputs[0]]
        return lowered.emit(Sums(conv.op.writes), node, backend=conv.backend)
