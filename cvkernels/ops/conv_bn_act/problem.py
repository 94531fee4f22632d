"""The sizes and options of one ``conv_bn_act`` call, and their checks before anything is allocated
or launched."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cvkernels.ops.common.activation import ACTIVATIONS
from cvkernels.ops.common.arguments import (
    check_act,
    check_apart,
    check_bn,
    check_tensor,
    check_tensors,
    integer,
    pair,
)
from cvkernels.ops.common.convolution import (
    Pair,
    check_fits,
    check_options,
    check_parameters,
    dilation_of,
    output_size,
    pairs,
)
from cvkernels.ops.common.errors import InputValueError
from cvkernels.ops.common.norm import BatchNormParams
from cvkernels.ops.common.traffic import touched_positions

OP = "conv_bn_act"


class Parameters(NamedTuple):
    """The operands that a plan holds."""

    weight: Tensor
    bias: Tensor | None
    bn: BatchNormParams | None
    input_bn: BatchNormParams | None = None
    projection: Tensor | None = None


class Projection(NamedTuple):
    """A 1x1 convolution of residual[N, C, H, W] that gives it the output's shape."""

    C: int
    stride: tuple[int, int]


class Arguments(NamedTuple):
    """What a call is given, in the order of the registered op's arguments, and autocast's part."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None = None
    bn: BatchNormParams | None = None
    stride: Pair = 1
    padding: Pair = 0
    dilation: Pair = 1
    groups: int = 1
    act: str = "relu"
    residual: Tensor | None = None
    input_bn: BatchNormParams | None = None
    input_gate: Tensor | None = None
    out: Tensor | None = None
    autocast: torch.dtype | None = None  # what autocast converts x, weight and residual to
    projection: Tensor | None = None
    projection_stride: Pair = 1
    output_gate: Tensor | None = None

    @property
    def parameters(self) -> Parameters:
        return Parameters(self.weight, self.bias, self.bn, self.input_bn, self.projection)

    @property
    def like(self) -> tuple[Tensor | None, ...]:
        """Examples of the data beside x."""
        return self.residual, self.input_gate, self.out, self.output_gate


@dataclass(frozen=True)
class Problem:
    """One call, without its data: x[N, C, H, W], weight[K, C/groups, R, S]."""

    N: int
    C: int
    H: int
    W: int
    K: int
    R: int
    S: int
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    dtype: torch.dtype
    act: str
    has_bias: bool = False
    has_bn: bool = False
    has_residual: bool = False
    has_input_bn: bool = False
    has_input_gate: bool = False
    has_out: bool = False  # the call is given the output's memory
    has_output_gate: bool = False
    projection: Projection | None = None  # then has_residual is False

    @cached_property
    def P(self) -> int:
        """Height of the output."""
        return self._size[0]

    @cached_property
    def Q(self) -> int:
        """Width of the output."""
        return self._size[1]

    @cached_property
    def _size(self) -> tuple[int, int]:
        return output_size(
            (self.H, self.W), (self.R, self.S), self.stride, self.padding, self.dilation
        )

    @property
    def pointwise(self) -> bool:
        """True for a 1x1 convolution without padding: a matrix product over pixels."""
        return (self.R, self.S) == (1, 1) and self.padding == (0, 0)

    @property
    def has_prologue(self) -> bool:
        return self.has_input_bn or self.has_input_gate

    @property
    def flops(self) -> int:
        """Multiply-adds counted as two, without the epilogue."""
        depth = (self.C // self.groups) * self.R * self.S
        depth += self.projection.C if self.projection else 0
        return 2 * self.N * self.P * self.Q * self.K * depth

    @property
    def bytes_read(self) -> int:
        """Every input element that some output element needs, once; BN vectors are float32."""
        pixels = touched_positions(
            self.H, self.R, self.stride[0], self.padding[0], self.dilation[0], self.P
        )
        pixels *= touched_positions(
            self.W, self.S, self.stride[1], self.padding[1], self.dilation[1], self.Q
        )
        elements = self.N * self.C * pixels + self.K * (self.C // self.groups) * self.R * self.S
        elements += self.N * self.K * self.P * self.Q * self.has_residual
        elements += self.N * (self.C * self.has_input_gate + self.K * self.has_output_gate)
        if self.projection is not None:
            elements += self.projection.C * (self.N * self.P * self.Q + self.K)
        vectors = self.K * (self.has_bias + 4 * self.has_bn) + 4 * self.C * self.has_input_bn
        return elements * self.dtype.itemsize + 4 * vectors

    @property
    def bytes_written(self) -> int:
        return self.N * self.K * self.P * self.Q * self.dtype.itemsize


def problem_of(*given: Any, **named: Any) -> Problem:
    """The checked call of these :class:`Arguments`."""
    (
        x, weight, bias, bn, stride, padding, dilation, groups, act, residual, input_bn, input_gate,
        out, autocast, projection, projection_stride, output_gate,
    ) = Arguments(*given, **named)  # fmt: skip
    check_tensors(OP, {"residual": residual, "projection": projection}, x=x, weight=weight)
    check_act(OP, "act", act, tuple(ACTIVATIONS))
    groups = integer(OP, "groups", groups)
    problem = _shapes(
        x.shape, weight.shape, pairs(OP, stride, padding, dilation), groups, autocast or x.dtype,
        act, bias is not None, bn is not None, residual is not None and projection is None,
        input_bn is not None, input_gate is not None, out is not None, output_gate is not None,
    )  # fmt: skip
    check_parameters(OP, problem, x, weight, bias, bn, autocast)
    if input_bn is not None:
        check_bn(OP, "input_bn", input_bn, problem.C, x)
    if input_gate is not None:
        check_tensor(OP, "input_gate", input_gate, (problem.N, problem.C), "[N, C]", x)
    if output_gate is not None:
        check_tensor(OP, "output_gate", output_gate, (problem.N, problem.K), "[N, K]", x)
    shape = (problem.N, problem.K, problem.P, problem.Q)
    if projection is not None:
        problem = _projected(problem, x, residual, projection, projection_stride)
    elif residual is not None:
        check_tensor(OP, "residual", residual, shape, "[N, K, P, Q]", x)
        if autocast is None and residual.dtype != x.dtype:
            raise TypeError(f"{OP}: residual must have x's dtype {x.dtype}, got {residual.dtype}")
    if out is not None:
        _check_out(out, shape, problem.dtype, x)
    return problem


@functools.lru_cache(maxsize=4096)
def _shapes(
    x: torch.Size, weight: torch.Size, geometry: tuple[tuple[int, int], ...], groups: int,
    dtype: torch.dtype, act: str, *flags: Any,
) -> Problem:  # fmt: skip
    check_options(OP, x, dtype, geometry)
    if len(weight) != 4 or 0 in weight:
        raise ValueError(
            f"conv_bn_act: weight must have shape [K, C/groups, R, S], got {list(weight)}"
        )
    (N, C, H, W), (K, _, R, S) = x, weight
    if groups < 1 or C % groups or K % groups:
        raise InputValueError(
            f"conv_bn_act: groups must divide the channels of x (C = {C}) and of the output "
            f"(K = {K}), got groups = {groups}"
        )
    if weight[1] != C // groups:
        raise InputValueError(
            f"conv_bn_act: weight must have C/groups = {C}/{groups} = {C // groups} input channels "
            f"to match x {list(x)}, got {list(weight)}"
        )
    stride, padding, dilation = geometry
    dilation = dilation_of(OP, (R, S), dilation)
    problem = Problem(N, C, H, W, K, R, S, stride, padding, dilation, groups, dtype, act, *flags)
    check_fits(OP, problem)
    return problem


def _projected(
    problem: Problem, x: Tensor, residual: Tensor | None, weight: Tensor, stride: Pair
) -> Problem:
    """The problem with the checked projection of its residual."""
    if residual is None or residual.dim() != 4:
        got = "none" if residual is None else list(residual.shape)
        raise ValueError(f"{OP}: a projection needs a residual[N, C, H, W], got {got}")
    N, C, H, W = residual.shape
    check_tensor(OP, "projection", weight, (problem.K, C, 1, 1), "[K, C, 1, 1]", x)
    step = pair(OP, "projection_stride", stride)
    if min(step) < 1:
        raise ValueError(f"{OP}: projection_stride must be at least 1, got {list(step)}")
    made = (N, *output_size((H, W), (1, 1), step, (0, 0), (1, 1)))
    if made != (problem.N, problem.P, problem.Q):
        raise ValueError(
            f"{OP}: residual {list(residual.shape)} with projection_stride {list(step)} gives "
            f"[N, P, Q] = {list(made)}, and the convolution {[problem.N, problem.P, problem.Q]}"
        )
    for name, tensor in (("residual", residual), ("projection", weight)):
        if tensor.dtype != x.dtype:
            raise TypeError(f"{OP}: {name} must have x's dtype {x.dtype}, got {tensor.dtype}")
    return replace(problem, projection=Projection(C, step))


def _check_out(out: Tensor, shape: tuple, dtype: torch.dtype, x: Tensor) -> None:
    check_tensor(OP, "out", out, shape, "[N, K, P, Q]", x)
    if out.dtype != dtype:
        raise TypeError(f"conv_bn_act: out must have dtype {dtype}, got {out.dtype}")
    if out.shape[1] > 1 and out.stride(1) != 1:
        raise ValueError(
            f"conv_bn_act: out must have channel stride 1 (channels_last, or a channel slice of a "
            f"channels_last buffer), got strides {list(out.stride())}"
        )
    check_apart(OP, "out", out)
