"""conv_bn_act of bytes on the CPU: csrc/conv_bn_act/quantised.cpp, and the same by PyTorch.

A quantised tensor holds bytes q that stand for ``(q - zero) * scale``; weights are signed bytes
with a scale for each output channel and no zero (Jacob et al. 2018, arXiv:1712.05877). Products are
summed in 32-bit integers, so that the sums are the same on every processor and for any number of
threads; what becomes of a sum is computed in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cvkernels import extension
from cvkernels.ops.common import native
from cvkernels.ops.common.activation import activate, code
from cvkernels.ops.conv_bn_act.native import FEW, PANEL
from cvkernels.ops.quantised.quantisation import Quantisation

OP = "conv_bn_act_quantised"
QUAD = 4  # bytes that are multiplied together
WEIGHTS = 1 << 16  # of a filter, at most: sums have 32 bits

library = torch.library.Library("cvkernels", "FRAGMENT")
library.define(
    f"{OP}(Tensor x, Tensor weight, Tensor vectors, Tensor(a!) out, Tensor? residual, "
    "Tensor? input_affine, Tensor? input_gate, Tensor? output_gate, int kernel_h, int kernel_w, "
    "int stride_h, int stride_w, int padding_h, int padding_w, int dilation_h, int dilation_w, "
    "int act, int zero, float x_zero, float gate_scale, float offset, float residual_scale, "
    "float low, float high, float out_scale, float out_zero) -> ()"
)
extension.load()
native.writes(library, OP)


@dataclass(frozen=True, eq=False)
class Convolution:
    """``act((conv(u) * weight_scale + bias) * output_gate + residual)`` of a quantised x.

    u is x, or ``x * gate`` with an input gate, or with ``input_affine`` relu of x scaled and
    shifted; it is multiplied in bytes, too, as ``operand`` says.

    Attributes:
        weight: int8[K, C, R, S], between -127 and 127.
        weight_scale, bias: float32[K].
        act: "none", "relu", "relu6" or "silu".
        x, residual: how these are quantised.
        operand: how u is, where it is not x.
        out: how the result is; None for float32.
        input_affine: float32[2, C], scale and shift from bytes of x to bytes of the operand, whose
            zero is 0.
        gated: the result is multiplied by gates.
    """

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    act: str
    x: Quantisation
    out: Quantisation | None
    operand: Quantisation | None = None
    residual: Quantisation | None = None
    input_affine: Tensor | None = None
    gated: bool = False

    @property
    def multiplied(self) -> Quantisation:
        """How what is multiplied is quantised."""
        return self.x if self.operand is None else self.operand

    def size(self, x: tuple[int, ...]) -> tuple[int, int, int, int]:
        K, _, *kernel = self.weight.shape
        axes = zip(x[2:], kernel, self.stride, self.padding, self.dilation, strict=True)
        P, Q = ((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in axes)
        return x[0], K, P, Q

    def scales(self) -> _Scales:
        """What becomes of the sums; in bytes of the result but for SiLU, which is of numbers."""
        operand, out, silu = self.multiplied, self.out, self.act == "silu"
        unit, zero = (1.0, 0) if out is None or silu else out
        scale = self.weight_scale.double() * operand.scale / unit
        sums = self.weight.sum((1, 2, 3), dtype=torch.int64)
        shift = self.bias.double() / unit - scale * sums * operand.zero
        residual_scale, offset = 0.0, float(zero)
        if self.residual is not None:
            residual_scale = self.residual.scale / unit
            offset -= residual_scale * self.residual.zero
        if not self.gated:
            shift, offset = shift + offset, 0.0
        low, high = -float("inf"), float("inf")
        if self.act in ("relu", "relu6"):
            low = float(zero)
        if self.act == "relu6":
            high = 6.0 / unit + zero
        if out is not None:
            low, high = max(low, 0.0), min(high, 255.0)
        out_scale, out_zero = (1.0, 0.0) if out is None else (1.0 / out.scale, float(out.zero))
        numbers = (offset, residual_scale, low, max(low, high), out_scale, out_zero)
        return _Scales(scale.float(), shift.float(), (128 * sums).int(), *numbers)

    def gate_scale(self) -> float:
        """What gates are multiplied by, so that bytes of x become bytes of the operand."""
        return self.x.scale / self.multiplied.scale


class _Scales(NamedTuple):
    """See ``Quantised`` in csrc/conv_bn_act/problem.h."""

    scale: Tensor
    shift: Tensor
    surplus: Tensor
    offset: float
    residual_scale: float
    low: float
    high: float
    out_scale: float
    out_zero: float

    @property
    def numbers(self) -> tuple[float, ...]:
        return self[3:]

    def vectors(self) -> Tensor:
        """The three with whole panels, as float32[3, panels * PANEL]."""
        rows = torch.stack([self.scale, self.shift, self.surplus.view(torch.float32)])
        return F.pad(rows, (0, -rows.shape[1] % PANEL)).contiguous()


def pack(weight: Tensor, bands: bool) -> Tensor:
    """weight[K, C, R, S] as [K/16, R * S * C / 4, 16, 4], given as floats of as many bits.

    With ``bands`` each tap has whole quads, else each filter. What completes them is zero.
    """
    panels = F.pad(weight, (0, 0, 0, 0, 0, 0, 0, -len(weight) % PANEL)).unflatten(0, (-1, PANEL))
    rows = panels.permute(0, 3, 4, 2, 1).flatten(3 if bands else 1, 3)  # [K/16, ..., C, 16]
    rows = F.pad(rows, (0, 0, 0, -rows.shape[-2] % QUAD)).flatten(1, -2)
    return rows.unflatten(1, (-1, QUAD)).transpose(2, 3).contiguous().view(torch.float32)


def convolve(conv: Convolution) -> Callable[..., Tensor]:
    """A function of (x, out, residual=None, input_gate=None, output_gate=None), which writes out.

    x and residual are uint8[N, C, H, W] and uint8[N, K, P, Q], gates float32[N, C] and [N, K]. out
    is uint8[N, K, P, Q], or float32 as ``conv.out`` says, channels_last or a channel slice of such
    a tensor, as residual is.
    """
    return _compiled(conv) if extension.has("cpu") else _reference(conv)


def _compiled(conv: Convolution) -> Callable[..., Tensor]:
    run = getattr(torch.ops.cvkernels, OP).default
    scales, affine, (_, C, *kernel) = conv.scales(), conv.input_affine, conv.weight.shape
    zero, x_zero = conv.multiplied.zero, float(conv.x.zero)
    geometry = (*kernel, *conv.stride, *conv.padding, *conv.dilation, code(conv.act))
    options = (*geometry, zero, x_zero, conv.gate_scale(), *scales.numbers)
    vectors = scales.vectors()
    few = C % QUAD != 0 and C < FEW and conv.dilation[1] == 1
    # Rows of an image that is read as it is get more channels.
    weight = pack(conv.weight, bands=few and conv.operand is None)

    def convolution(
        x: Tensor, out: Tensor, residual: Tensor | None = None, input_gate: Tensor | None = None,
        output_gate: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        run(x, weight, vectors, out, residual, affine, input_gate, output_gate, *options)
        return out

    return convolution


def _reference(conv: Convolution) -> Callable[..., Tensor]:
    scales, affine, zero = conv.scales(), conv.input_affine, conv.multiplied.zero
    weight = conv.weight.double()

    def convolution(
        x: Tensor, out: Tensor, residual: Tensor | None = None, input_gate: Tensor | None = None,
        output_gate: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        u = x.float()
        if affine is not None:
            scale, shift = affine.view(2, 1, -1, 1, 1)
            u = (u * scale + shift).clamp_min(0.0)
        if input_gate is not None:
            gate = input_gate[:, :, None, None] * conv.gate_scale()
            u = (u - conv.x.zero) * gate + zero
        u = u.round().clamp(0, 255).double()
        (top, left) = conv.padding
        u = F.pad(u, (left, left, top, top), value=float(zero))
        # Exact: sums of fewer than 2^16 products of 15 bits.
        sums = F.conv2d(u, weight, None, conv.stride, 0, conv.dilation).float()
        y = sums * scales.scale.view(-1, 1, 1) + scales.shift.view(-1, 1, 1)
        if output_gate is not None:
            y = y * output_gate[:, :, None, None] + scales.offset
        if residual is not None:
            y = y + residual.float() * scales.residual_scale
        if conv.act == "silu":
            y = activate(y, "silu") * scales.out_scale + scales.out_zero
        y = y.clamp(scales.low, scales.high)
        return out.copy_(y if conv.out is None else y.round())

    return convolution
