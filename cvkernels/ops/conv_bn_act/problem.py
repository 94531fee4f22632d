"""The sizes and options of one ``conv_bn_act`` call: what a backend chooses by and plans with."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from cvkernels.ops.common.traffic import touched_positions


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
    sliced_out: bool = False

    @cached_property
    def P(self) -> int:
        """Height of the output."""
        return (self.H + 2 * self.padding[0] - self.dilation[0] * (self.R - 1) - 1) // self.stride[
            0
        ] + 1

    @cached_property
    def Q(self) -> int:
        """Width of the output."""
        return (self.W + 2 * self.padding[1] - self.dilation[1] * (self.S - 1) - 1) // self.stride[
            1
        ] + 1

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
        return 2 * self.N * self.P * self.Q * self.K * (self.C // self.groups) * self.R * self.S

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
        elements += self.N * self.C * self.has_input_gate
        vectors = self.K * (self.has_bias + 4 * self.has_bn) + 4 * self.C * self.has_input_bn
        return elements * self.dtype.itemsize + 4 * vectors

    @property
    def bytes_written(self) -> int:
        return self.N * self.K * self.P * self.Q * self.dtype.itemsize
