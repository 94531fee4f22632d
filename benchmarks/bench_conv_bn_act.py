"""conv_bn_act against the stock modules, eager and compiled, on every convolution of ResNet-50.

Forward everywhere; backward and the host's time per call on a few shapes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness.case import Case, Conditions, cases_of, variants_of
from cvkernels.functional import BatchNormParams, DerivedWeights, conv_bn_act
from cvkernels.ops.conv_bn_act.problem import Problem
from cvkernels.ops.conv_bn_act.reference import conv_bn_act_reference
from tests.support.cases.conv_bn_act import ODD, RESNET50, Conv, make_inputs

QUICK = (
    "stem", "layer1.conv3", "layer2.1.conv2", "layer3.0.downsample", "layer4.1.conv1", "grouped",
)  # fmt: skip
BACKWARD = ("stem", "layer2.1.conv2", "layer3.conv3")
ODD_ONES = ("channels-not-8", "rectangle-kernel", "dilated", "grouped", "resnext-groups")
HOST = ("one-pixel", ODD["one-pixel"])


def stock(
    x: Tensor, weight: Tensor, bn: BatchNormParams, *, act: str, residual: Tensor | None = None,
    **geometry,
) -> Tensor:  # fmt: skip
    """What the stock block calls: nn.Conv2d, nn.BatchNorm2d, the addition and nn.ReLU, in place."""
    y = F.conv2d(x, weight, None, **geometry)
    y = F.batch_norm(y, bn.mean, bn.var, bn.weight, bn.bias, training=False, eps=bn.eps)
    if residual is not None:
        y += residual
    return y.relu_() if act == "relu" else y


def reference(x: Tensor, weight: Tensor, bn: BatchNormParams, **options) -> Tensor:
    return conv_bn_act_reference(x, weight, None, bn, **options)


def fused(backend: str) -> Callable[..., Tensor]:
    """conv_bn_act as the modules call it: with a cache of what it derives from the weights."""
    cache = DerivedWeights()

    def call(x: Tensor, weight: Tensor, bn: BatchNormParams, **options) -> Tensor:
        return conv_bn_act(x, weight, None, bn, cache=cache, backend=backend, **options)

    return call


def options_of(name: str) -> tuple[str, bool]:
    """(act, residual) of the convolution in its block."""
    if name.endswith("downsample"):
        return "none", False
    return "relu", name.endswith("conv3")


def problem_of(name: str, conv: Conv, dtype: torch.dtype) -> Problem:
    act, residual = options_of(name)

    def pair(value: int | tuple[int, int]) -> tuple[int, int]:
        return (value, value) if isinstance(value, int) else value

    return Problem(
        conv.N, conv.C, conv.H, conv.W, conv.K, conv.R, conv.S,
        pair(conv.stride), pair(conv.padding), pair(conv.dilation), conv.groups,
        dtype, act, has_bn=True, has_residual=residual,
    )  # fmt: skip


def inputs_of(name: str, conv: Conv, at: Conditions) -> tuple[tuple, dict]:
    act, has_residual = options_of(name)
    (x, weight, _, bn), options = make_inputs(conv, at.dtype, torch.channels_last, at.device)
    options["act"] = act
    if has_residual:
        problem = problem_of(name, conv, at.dtype)
        options["residual"] = at.image(conv.K, problem.P, problem.Q)
    at.leaves(x, weight, bn.weight, bn.bias, options.get("residual"))
    return (x, weight, bn), options


def variants_on(device: torch.device) -> dict[str, Callable[[], Callable]]:
    variants = variants_of(stock, lambda: fused("auto"))
    if device.type == "cuda":
        variants["cvkernels triton"] = lambda: fused("triton")
        variants["cvkernels cudnn"] = lambda: fused("cudnn")
        variants["cvkernels halo"] = lambda: fused("halo")
    return variants


def backward_traffic(problem: Problem) -> int:
    """What the gradients of x, weight, bn's affine vectors and residual take, after a ReLU.

    Read once: x, weight, bn, the output and its gradient. The output tells where the ReLU was open;
    the norm's input is computed again from x and weight. Each gradient is written once.
    """
    out = problem.bytes_written
    read = problem.bytes_read - out * problem.has_residual + 2 * out
    elements = problem.N * problem.C * problem.H * problem.W
    elements += problem.K * (problem.C // problem.groups) * problem.R * problem.S
    written = elements * problem.dtype.itemsize + 2 * 4 * problem.K + out * problem.has_residual
    return read + written


def case_of(name: str, conv: Conv, at: Conditions) -> Case:
    conv = replace(conv, N=at.batch)
    problem = problem_of(name, conv, at.dtype)
    traffic, flops = problem.bytes_read + problem.bytes_written, problem.flops
    if at.part == "backward":
        # Two convolutions: for the gradient of x and for that of weight.
        traffic, flops = backward_traffic(problem), 2 * flops
    window = f"{conv.R}x{conv.S}/{conv.stride}"
    added = " + residual" if problem.has_residual else ""
    return at.case(
        "conv_bn_act",
        name,
        f"{conv.N}x{conv.C}x{conv.H}x{conv.W} {window} -> {conv.K}{added}",
        inputs=functools.partial(inputs_of, name, conv, at),
        reference=reference,
        variants=variants_on(at.device),
        bytes=traffic,
        flops=flops,
    )


def distinct(convs: dict[str, Conv]) -> dict[str, Conv]:
    """The convolutions that differ in shape or in what follows them, each under its first name."""
    names: dict[tuple, str] = {}
    for name, conv in convs.items():
        names.setdefault((conv, options_of(name)), name)
    return {name: convs[name] for name in names.values()}


cases = cases_of(
    case_of, distinct(RESNET50) | {name: ODD[name] for name in ODD_ONES}, QUICK, HOST, BACKWARD
)


def test_conv_bn_act(measure):
    measure()
