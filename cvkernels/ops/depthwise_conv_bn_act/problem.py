"""The sizes and options of one call, and their checks before anything is allocated or launched."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from cvkernels.ops.common.arguments import check_bn, check_device, check_vector
from cvkernels.ops.common.convolution import check_fits, check_options, pairs
from cvkernels.ops.common.norm import BatchNormParams
from cvkernels.ops.conv_bn_act.problem import Problem

OP = "depthwise_conv_bn_act"


def sums_dtype(dtype: torch.dtype) -> torch.dtype:
    """What the sums of a map of ``dtype`` are in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class DepthwiseProblem(Problem):
    """One call, without its data: x[N, C, H, W], weight[C, 1, R, S], and sums[N, C] on request."""

    squeeze: bool = False

    @property
    def sums_dtype(self) -> torch.dtype:
        return sums_dtype(self.dtype)

    @property
    def bytes_written(self) -> int:
        return super().bytes_written + self.N * self.C * self.squeeze * self.sums_dtype.itemsize


def problem_of(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bn: BatchNormParams | None,
    stride: int | tuple[int, int],
    padding: int | tuple[int, int],
    dilation: int | tuple[int, int],
    act: str,
    squeeze: bool,
    dtype: torch.dtype | None = None,
) -> DepthwiseProblem:
    """The checked call; ``dtype`` is what autocast will convert x and weight to."""
    problem = _shapes(
        x.shape,
        weight.shape,
        *pairs(OP, stride, padding, dilation),
        dtype or x.dtype,
        act,
        bias is not None,
        bn is not None,
        bool(squeeze),
    )
    if dtype is None and weight.dtype != x.dtype:
        raise TypeError(
            f"{OP}: weight must have x's dtype {x.dtype}, got {weight.dtype}; "
            f"convert one with .to(), or run under torch.autocast"
        )
    check_device(OP, "weight", weight, x)
    if bias is not None:
        check_vector(OP, "bias", bias, problem.C, x)
    if bn is not None:
        check_bn(OP, "bn", bn, problem.C, x)
    return problem


@functools.lru_cache(maxsize=4096)
def _shapes(
    x: torch.Size,
    weight: torch.Size,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    dtype: torch.dtype,
    act: str,
    has_bias: bool,
    has_bn: bool,
    squeeze: bool,
) -> DepthwiseProblem:
    if len(x) != 4:
        way_out = "; add the batch dimension with x.unsqueeze(0)" if len(x) == 3 else ""
        raise ValueError(f"{OP}: x must have shape [N, C, H, W], got {list(x)}{way_out}")
    N, C, H, W = x
    if len(weight) != 4 or tuple(weight[:2]) != (C, 1) or 0 in weight:
        raise ValueError(
            f"{OP}: weight must have shape [C, 1, R, S] with C = {C} to match x {list(x)}, got "
            f"{list(weight)}; conv_bn_act has groups= for other convolutions"
        )
    check_options(OP, dtype, act, (stride, padding, dilation), TypeError)
    problem = DepthwiseProblem(
        N, C, H, W, C, *weight[2:], stride, padding, dilation, C, dtype, act, has_bias, has_bn,
        squeeze=squeeze,
    )  # fmt: skip
    check_fits(OP, problem, ValueError)
    return problem
