"""depthwise_conv_bn_act against the stock modules, eager and compiled, on EfficientNet's maps.

Every depthwise convolution of EfficientNet-B0 and V2-S with its norm and SiLU, alone and with the
sums that squeeze-and-excitation takes; backward and the host's time per call on a few.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness.case import Case, Conditions, cases_of, compiled, variants_of
from cvkernels.functional import BatchNormParams, DerivedWeights, depthwise_conv_bn_act
from cvkernels.ops.depthwise_conv_bn_act.problem import DepthwiseProblem
from cvkernels.ops.depthwise_conv_bn_act.reference import depthwise_conv_bn_act_reference
from tests.support.cases.conv_bn_act import make_bn
from tests.support.cases.depthwise_conv_bn_act import NETWORKS, Depthwise


class Unit(NamedTuple):
    """A convolution, and whether the sums that squeeze-and-excitation takes come with it."""

    conv: Depthwise
    squeeze: bool = False


UNITS = {
    f"{name}.squeeze" if squeeze else name: Unit(conv, squeeze)
    for name, conv in NETWORKS.items()
    for squeeze in (False, True)
}
QUICK = {f"{name}{end}" for name in ("b0.1.0", "b0.3.0", "b0.5.1", "v2_s.4.1")
         for end in ("", ".squeeze")}  # fmt: skip
BACKWARD = ("b0.2.1", "b0.5.1")
HOST = ("small", Unit(Depthwise(32, 4, 3, 1)))


def stock(x: Tensor, weight: Tensor, bn: BatchNormParams, **geometry) -> Tensor:
    """What the stock block calls: nn.Conv2d, nn.BatchNorm2d and nn.SiLU, in place."""
    y = F.conv2d(x, weight, None, **geometry, groups=x.shape[1])
    y = F.batch_norm(y, bn.mean, bn.var, bn.weight, bn.bias, training=False, eps=bn.eps)
    return F.silu(y, inplace=not y.requires_grad)


def stock_squeeze(x: Tensor, weight: Tensor, bn: BatchNormParams, **geometry):
    """The same, and the mean that stock's squeeze-and-excitation takes."""
    y = stock(x, weight, bn, **geometry)
    return y, y.mean((2, 3))


def in_unit(function: Callable, squeeze: bool, **options) -> Callable[..., Tensor]:
    """``function`` as the networks call it; of the sums the mean, which is what is checked."""

    def call(x: Tensor, weight: Tensor, bn: BatchNormParams, **geometry) -> Tensor:
        y = function(x, weight, None, bn, **geometry, act="silu", squeeze=squeeze, **options)
        return y[1] / (y[0].shape[2] * y[0].shape[3]) if squeeze else y

    return call


def fused(squeeze: bool) -> Callable[..., Tensor]:
    """As the modules call it: with a cache of what it derives from the weights."""
    return in_unit(depthwise_conv_bn_act, squeeze, cache=DerivedWeights())


def variants_with(squeeze: bool) -> dict[str, Callable[[], Callable]]:
    if not squeeze:
        return variants_of(stock, lambda: fused(False))

    def mean_of(function: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., Tensor]:
        """The second result, which is checked; both are computed."""
        return lambda *args, **kwargs: function(*args, **kwargs)[1]

    return {
        "eager": lambda: mean_of(stock_squeeze),
        "compile": lambda: mean_of(compiled(stock_squeeze)),
        "cvkernels": lambda: fused(True),
    }


def problem_of(conv: Depthwise, squeeze: bool, at: Conditions) -> DepthwiseProblem:
    pairs = [(v, v) for v in (conv.stride, conv.kernel // 2, 1)]
    return DepthwiseProblem(
        at.batch, conv.C, conv.size, conv.size, conv.C, conv.kernel, conv.kernel, *pairs, conv.C,
        at.dtype, "silu", has_bn=True, squeeze=squeeze,
    )  # fmt: skip


def inputs_of(conv: Depthwise, at: Conditions) -> tuple[tuple, dict]:
    x = at.image(conv.C, conv.size, conv.size)
    weight = torch.randn(conv.C, 1, conv.kernel, conv.kernel, device=at.device) / conv.kernel
    weight, bn = weight.to(at.dtype), make_bn(conv.C, device=at.device)
    at.leaves(x, weight, bn.weight, bn.bias)
    return (x, weight, bn), {"stride": conv.stride, "padding": conv.kernel // 2}


def traffic(problem: DepthwiseProblem, part: str) -> int:
    """Compulsory bytes: x, weight and the norm read, out and sums written, each once.

    Backward reads x, weight, the norm and the gradient of out, since SiLU's derivative is computed
    again from x, and writes the gradients of x, weight and the norm's affine vectors.
    """
    forward = problem.bytes_read + problem.bytes_written
    if part != "backward":
        return forward
    elements = problem.N * problem.C * problem.H * problem.W
    elements += problem.C * problem.R * problem.S
    return forward + elements * problem.dtype.itemsize + 2 * 4 * problem.C


def case_of(name: str, unit: Unit, at: Conditions) -> Case:
    conv, squeeze = unit
    window = f"{conv.kernel}x{conv.kernel}/{conv.stride}"
    return at.case(
        "depthwise_conv_bn_act",
        name,
        f"{at.batch}x{conv.C}x{conv.size}x{conv.size} {window}",
        inputs=functools.partial(inputs_of, conv, at),
        reference=in_unit(depthwise_conv_bn_act_reference, squeeze),
        variants=variants_with(squeeze),
        bytes=traffic(problem_of(conv, squeeze, at), at.part),
    )


cases = cases_of(case_of, UNITS, QUICK, HOST, BACKWARD)


def test_depthwise_conv_bn_act(measure):
    measure()
