"""depthwise_conv_bn_act against the stock modules, eager and compiled, on EfficientNet's maps.

Every depthwise convolution of EfficientNet-B0 and V2-S with its norm and SiLU, alone and with the
sums that squeeze-and-excitation takes; backward and the host's time per call on a few.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness.case import Case, compiled, image, variants_of
from cvkernels.functional import BatchNormParams, DerivedWeights, depthwise_conv_bn_act
from cvkernels.ops.depthwise_conv_bn_act.problem import DepthwiseProblem
from cvkernels.ops.depthwise_conv_bn_act.reference import depthwise_conv_bn_act_reference
from tests.support.cases.conv_bn_act import make_bn
from tests.support.cases.depthwise_conv_bn_act import NETWORKS, Depthwise

QUICK = ("b0.1.0", "b0.3.0", "b0.5.1", "v2_s.4.1")
BACKWARD = ("b0.2.1", "b0.5.1")
HOST = ("small", Depthwise(32, 4, 3, 1))


def stock(x: Tensor, weight: Tensor, bn: BatchNormParams, **geometry) -> Tensor:
    """What the stock block calls: nn.Conv2d, nn.BatchNorm2d and nn.SiLU, in place."""
    y = F.conv2d(x, weight, None, **geometry, groups=x.shape[1])
    y = F.batch_norm(y, bn.mean, bn.var, bn.weight, bn.bias, training=False, eps=bn.eps)
    return F.silu(y, inplace=not y.requires_grad)


def stock_squeeze(x: Tensor, weight: Tensor, bn: BatchNormParams, **geometry):
    """The same, and the mean that stock's squeeze-and-excitation takes."""
    y = stock(x, weight, bn, **geometry)
    return y, y.mean((2, 3))


def reference(squeeze: bool) -> Callable[..., Tensor]:
    def call(x: Tensor, weight: Tensor, bn: BatchNormParams, **geometry) -> Tensor:
        y = depthwise_conv_bn_act_reference(
            x, weight, None, bn, **geometry, act="silu", squeeze=squeeze
        )
        return y[1] / (y[0].shape[2] * y[0].shape[3]) if squeeze else y

    return call


def fused(squeeze: bool) -> Callable[..., Tensor]:
    """As the modules call it: with a cache of what it derives from the weights."""
    cache = DerivedWeights()

    def call(x: Tensor, weight: Tensor, bn: BatchNormParams, **geometry) -> Tensor:
        y = depthwise_conv_bn_act(
            x, weight, None, bn, **geometry, act="silu", squeeze=squeeze, cache=cache
        )
        return y[1] / (y[0].shape[2] * y[0].shape[3]) if squeeze else y

    return call


def mean_of(function: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., Tensor]:
    """The second result, which is checked; both are computed."""
    return lambda *args, **kwargs: function(*args, **kwargs)[1]


def variants_with(squeeze: bool) -> dict[str, Callable[[], Callable]]:
    if not squeeze:
        return variants_of(stock, lambda: fused(False))
    return {
        "eager": lambda: mean_of(stock_squeeze),
        "compile": lambda: mean_of(compiled(stock_squeeze)),
        "cvkernels": lambda: fused(True),
    }


def problem_of(conv: Depthwise, batch: int, dtype: torch.dtype, squeeze: bool) -> DepthwiseProblem:
    pairs = [(v, v) for v in (conv.stride, conv.kernel // 2, 1)]
    return DepthwiseProblem(
        batch, conv.C, conv.size, conv.size, conv.C, conv.kernel, conv.kernel, *pairs, conv.C,
        dtype, "silu", has_bn=True, squeeze=squeeze,
    )  # fmt: skip


def inputs_of(
    conv: Depthwise, batch: int, dtype: torch.dtype, device: torch.device, grad: bool
) -> tuple[tuple, dict]:
    x = image(batch, conv.C, conv.size, conv.size, dtype=dtype, device=device)
    weight = torch.randn(conv.C, 1, conv.kernel, conv.kernel, device=device) / conv.kernel
    weight, bn = weight.to(dtype), make_bn(conv.C, device=device)
    if grad:
        for leaf in (x, weight, bn.weight, bn.bias):
            leaf.requires_grad_()
    return (x, weight, bn), {"stride": conv.stride, "padding": conv.kernel // 2}


def traffic(problem: DepthwiseProblem, part: str) -> int | None:
    """Compulsory bytes: x, weight and the norm read, out and sums written, each once.

    Backward reads x, weight, the norm and the gradient of out, since SiLU's derivative is computed
    again from x, and writes the gradients of x, weight and the norm's affine vectors.
    """
    if part == "host":
        return None
    if part == "forward":
        return problem.bytes_read + problem.bytes_written
    elements = problem.N * problem.C * problem.H * problem.W
    elements += problem.C * problem.R * problem.S
    written = elements * problem.dtype.itemsize + 2 * 4 * problem.C
    return problem.bytes_read + problem.bytes_written + written


def case_of(
    name: str,
    conv: Depthwise,
    batch: int,
    dtype: torch.dtype,
    device: torch.device,
    squeeze: bool = False,
    part: str = "forward",
) -> Case:
    problem = problem_of(conv, batch, dtype, squeeze)
    window = f"{conv.kernel}x{conv.kernel}/{conv.stride}"
    return Case(
        op="depthwise_conv_bn_act",
        name=f"{name}.squeeze" if squeeze else name,
        shape=f"{batch}x{conv.C}x{conv.size}x{conv.size} {window}",
        dtype=dtype,
        inputs=functools.partial(inputs_of, conv, batch, dtype, device, part == "backward"),
        reference=reference(squeeze),
        variants=variants_with(squeeze),
        bytes=traffic(problem, part),
        part=part,
    )


def cases(
    device: torch.device, dtypes: list[torch.dtype], batch: int, quick: bool = False
) -> list[Case]:
    convs = {name: conv for name, conv in NETWORKS.items() if name in QUICK or not quick}
    made = []
    for dtype in dtypes:
        for name, conv in convs.items():
            made += [
                case_of(name, conv, batch, dtype, device, squeeze) for squeeze in (False, True)
            ]
        made += [
            case_of(name, convs[name], batch, dtype, device, part="backward")
            for name in BACKWARD
            if name in convs
        ]
        made.append(case_of(*HOST, 2, dtype, device, part="host"))
    return made


def test_depthwise_conv_bn_act(measure):
    measure()
