"""Ops on quantised maps, uint8[N, C, H, W]: what a graph frozen in int8 has.

A pair (scale, zero) says how bytes q stand for numbers: ``(q - zero) * scale``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cvkernels import extension
from cvkernels.freeze.graph import Node, Op, Run, Step, TensorSpec
from cvkernels.freeze.ops.convolution import Conv, Sums
from cvkernels.freeze.ops.pooling import Pool
from cvkernels.freeze.ops.squeeze_excite import Squeeze
from cvkernels.ops.common.derived_weights import derived
from cvkernels.ops.common.plan import Plan
from cvkernels.ops.common.traffic import Traffic
from cvkernels.ops.quantised import convolution, depthwise, maps
from cvkernels.ops.quantised.quantisation import Quantisation

if TYPE_CHECKING:
    from cvkernels.freeze.lower import Lowered
    from cvkernels.freeze.steps import Site

Pair = tuple[float, int]


class _Int8(Op, writes=True):
    """An op that writes its value by one function of the values of its inputs and its memory."""

    def infer(self, node: Node, inputs: list, device: torch.device) -> TensorSpec:
        spec = super().infer(node, inputs, device)
        return spec._replace(dtype=self.dtype)

    @property
    def dtype(self) -> torch.dtype:
        """That of the value."""
        return torch.uint8

    def lower(self, node: Node, lowered: Lowered) -> Step:
        return lowered.emit(self, node, backend="native" if extension.has("cpu") else "reference")

    def planned(self, site: Site, write: Callable[..., Any]) -> Callable[..., Any]:
        """``write``, as the one kernel that the step runs."""
        traffic = Traffic(1, *self.traffic(site.step)[1:])
        site.plans.append(Plan(self.name, site.step.backend, "frozen", write, traffic))
        return write


class Quantise(_Int8, name="quantise", placeable=True):
    """Bytes of numbers; with ``channels`` so many, of which those past x's stand for 0."""

    to: Pair
    channels: int | None = None

    def shape(self, node: Node, x: tuple) -> tuple:
        return (x[0], self.channels or x[1], *x[2:])

    def build(self, site: Site) -> Run:
        (x,), to = site.inputs, Quantisation(*self.to)
        write = self.planned(site, maps.quantise)
        return site.written(lambda env, y: write(env[x], to, y))


class Dequantise(_Int8, name="dequantise", placeable=True):
    """The numbers that bytes stand for."""

    of: Pair

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    def build(self, site: Site) -> Run:
        (x,), of = site.inputs, Quantisation(*self.of)
        write = self.planned(site, maps.dequantise)
        return site.written(lambda env, y: write(env[x], of, y))


class QuantisedConv(_Int8, name="conv_int8", placeable=True):
    """A convolution of bytes, see :class:`cvkernels.ops.quantised.convolution.Convolution`."""

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    act: str
    x: Pair
    out: Pair | None
    roles: tuple[str, ...] = ("x",)
    operand: Pair | None = None
    residual: Pair | None = None
    input_affine: Tensor | None = None
    # What Conv.shape looks at.
    groups: int = 1
    projection: None = None

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.out is None else torch.uint8

    shape = Conv.shape

    def build(self, site: Site) -> Run:
        def of(pair: Pair | None) -> Quantisation | None:
            return None if pair is None else Quantisation(*pair)

        conv = convolution.Convolution(
            self.weight, self.weight_scale, self.bias, tuple(self.stride), tuple(self.padding),
            tuple(self.dilation), self.act, Quantisation(*self.x), of(self.out), of(self.operand),
            of(self.residual), self.input_affine, "output_gate" in self.roles,
        )  # fmt: skip
        make = functools.partial(convolution.convolve, conv)
        convolve = self.planned(site, derived(site.cache, "int8", (self.weight,), make))
        x, residual, gate, output_gate = map(site.role, ("x", "residual", "gate", "output_gate"))
        return site.written(
            lambda env, y: convolve(env[x], y, env[residual], env[gate], env[output_gate])
        )


class QuantisedDepthwise(_Int8, name="depthwise_int8"):
    """A depthwise convolution of bytes, and with ``squeeze`` the sums over its pixels."""

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor
    stride: tuple[int, int]
    padding: tuple[int, int]
    act: str
    x: Pair
    out: Pair
    squeeze: bool = False

    def shape(self, node: Node, x: tuple) -> tuple:
        node.check(len(x) == 4, "[N, C, H, W]", x)
        node.check(x[1] == len(self.weight), f"{len(self.weight)} channels", x)
        kernel = self.weight.shape[2]
        axes = zip(x[2:], self.stride, self.padding, strict=True)
        size = tuple((n + 2 * p - kernel) // step + 1 for n, step, p in axes)
        node.check(min(size) > 0, f"a larger map than {x[2]}x{x[3]} for its kernel", x)
        return (*x[:2], *size)

    def build(self, site: Site) -> Run:
        conv = depthwise.Depthwise(
            self.weight, self.weight_scale, self.bias, tuple(self.stride), tuple(self.padding),
            self.act, Quantisation(*self.x), Quantisation(*self.out),
        )  # fmt: skip
        make = functools.partial(depthwise.convolve, conv)
        convolve = self.planned(site, derived(site.cache, "int8", (self.weight,), make))
        (x,), sums = site.inputs, site.reader(Sums)
        return site.written(lambda env, y: convolve(env[x], y, env[sums]))


class QuantisedMaxPool(_Int8, Pool, name="max_pool_int8", placeable=True):
    """A max pool of bytes, which stand for numbers as those of x do."""

    window: tuple

    def build(self, site: Site) -> Run:
        (x,), window = site.inputs, self.window
        pool = self.planned(site, maps.max_pool)
        return site.written(lambda env, y: pool(env[x], window, y))


class QuantisedAvgPool(_Int8, Pool, name="avg_pool_int8", placeable=True):
    """An average pool of bytes, which stand for numbers as those of x do, or as ``input_affine``
    [2, C] makes them."""

    window: tuple
    count_include_pad: bool
    divisor: int | None
    input_affine: Tensor | None = None

    def build(self, site: Site) -> Run:
        (x,), affine = site.inputs, self.input_affine
        options = (self.window, self.count_include_pad, self.divisor, affine)
        pool = self.planned(site, maps.avg_pool)
        return site.written(lambda env, y: pool(env[x], *options, y))


class QuantisedMean(_Int8, name="mean_int8"):
    """The mean of each channel of x over all pixels, float32[N, C, 1, 1]; with ``input_affine``
    [2, C] that of the numbers which it makes of bytes, before a ReLU."""

    x: Pair
    input_affine: Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    def shape(self, node: Node, x: tuple) -> tuple:
        return (*x[:2], 1, 1)

    def build(self, site: Site) -> Run:
        (x,), of, affine = site.inputs, Quantisation(*self.x), self.input_affine
        take = self.planned(site, maps.mean)
        return site.written(lambda env, y: take(env[x], of, affine, y.flatten(1)))


class QuantisedSqueeze(QuantisedMean, Squeeze, name="squeeze_int8", kept=False):
    """The same as float32[N, C]."""

    def shape(self, node: Node, x: tuple) -> tuple:
        return x[:2]
