"""A checked depthwise_conv_bn_act call as a function of x, for who calls it again and again."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from cvkernels import backend as backends
from cvkernels.ops.common.activation import ACTIVATIONS
from cvkernels.ops.common.autograd import needs_grad
from cvkernels.ops.common.derived_weights import DerivedWeights
from cvkernels.ops.common.norm import BatchNormParams
from cvkernels.ops.depthwise_conv_bn_act import native
from cvkernels.ops.depthwise_conv_bn_act.op import IMPLEMENTATIONS, select
from cvkernels.ops.depthwise_conv_bn_act.problem import problem_of

# x -> (out, sums), which are None where they were not asked for.
Run = Callable[[Tensor], tuple[Tensor, Tensor | None]]


def prepared(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bn: BatchNormParams | None,
    geometry: tuple,
    act: str,
    squeeze: bool,
    cache: DerivedWeights,
) -> Run | None:
    """What runs this call on another x of the same shape and dtype, unchecked.

    It holds the packed weights, so it is right while the parameters stay as they are. None where
    "auto" runs something else than the native op, or autograd has to see the call.
    """
    tensors = (x, weight, bias, bn)
    if needs_grad(tensors) or backends.requested("auto", IMPLEMENTATIONS) != "auto":
        return None
    problem = problem_of(*tensors, *geometry, act, squeeze)
    if not problem.bytes_written or select(problem, x, False, "auto").backend != "native":
        return None
    packed = native.packed(weight, bias, bn, cache)
    options = (problem.R, problem.stride[0], *problem.padding, ACTIVATIONS.index(act))
    size = (problem.N, problem.P, problem.Q, problem.C)
    return functools.partial(_convolve, packed, options, size, squeeze)


def _convolve(
    packed: tuple[Tensor, Tensor], options: tuple, size: tuple, squeeze: bool, x: Tensor
) -> tuple[Tensor, Tensor | None]:
    out = x.new_empty(size)
    sums = x.new_empty((size[0], size[3]), dtype=torch.float32) if squeeze else None
    native.convolve(x, *packed, *options, out, sums)
    return out.permute(0, 3, 1, 2), sums
