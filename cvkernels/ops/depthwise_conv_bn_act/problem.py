"""The sizes and options of one call, and their checks before anything is allocated or launched."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cvkernels.ops.common.activation import ACTIVATIONS
from cvkernels.ops.common.arguments import check_act, check_tensors
from cvkernels.ops.common.convolution import (
    Pair,
    check_fits,
    check_options,
    check_parameters,
    pairs,
)
from cvkernels.ops.common.norm import BatchNormParams, accumulator
from cvkernels.ops.conv_bn_act.problem import Problem

OP = "depthwise_conv_bn_act"


@dataclass(frozen=True)
class DepthwiseProblem(Problem):
    """One call, without its data: x[N, C, H, W], weight[C, 1, R, S], and sums[N, C] on request."""

    squeeze: bool = False

    @property
    def bytes_written(self) -> int:
        sums = self.N * self.C * accumulator(self.dtype).itemsize
        return super().bytes_written + self.squeeze * sums


class Arguments(NamedTuple):
    """What a call is given, in the order of the registered op's arguments, and autocast's part."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None = None
    bn: BatchNormParams | None = None
    stride: Pair = 1
    padding: Pair = 0
    dilation: Pair = 1
    act: str = "none"
    squeeze: bool = False
    autocast: torch.dtype | None = None  # what autocast converts x and weight to


def problem_of(*given: Any, **named: Any) -> DepthwiseProblem:
    """The checked call of these :class:`Arguments`."""
    x, weight, bias, bn, stride, padding, dilation, act, squeeze, dtype = Arguments(*given, **named)
    check_tensors(OP, x=x, weight=weight)
    check_act(OP, "act", act, tuple(ACTIVATIONS))
    problem = _shapes(
        x.shape, weight.shape, pairs(OP, stride, padding, dilation), dtype or x.dtype, act,
        bias is not None, bn is not None, bool(squeeze),
    )  # fmt: skip
    check_parameters(OP, problem, x, weight, bias, bn, dtype)
    return problem


@functools.lru_cache(maxsize=4096)
def _shapes(
    x: torch.Size, weight: torch.Size, geometry: tuple[tuple[int, int], ...],
    dtype: torch.dtype, act: str, has_bias: bool, has_bn: bool, squeeze: bool,
) -> DepthwiseProblem:  # fmt: skip
    check_options(OP, x, dtype, geometry)
    N, C, H, W = x
    if len(weight) != 4 or tuple(weight[:2]) != (C, 1) or 0 in weight:
        raise ValueError(
            f"{OP}: weight must have shape [C, 1, R, S] with C = {C} to match x {list(x)}, got "
            f"{list(weight)}; conv_bn_act has groups= for other convolutions"
        )
    _, _, R, S = weight
    stride, padding, dilation = geometry
    problem = DepthwiseProblem(
        N, C, H, W, C, R, S, stride, padding, dilation, C, dtype, act, has_bias, has_bn,
        squeeze=squeeze,
    )  # fmt: skip
    check_fits(OP, problem)
    return problem
