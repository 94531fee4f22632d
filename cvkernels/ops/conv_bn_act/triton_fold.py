"""A norm folded into a convolution's weight by one Triton kernel, channels innermost.

PyTorch's own operations take some twenty launches for it, which a CUDA graph would repeat at each
replay and a compiled model at each call.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cvkernels.ops.common.norm import BatchNormParams
from cvkernels.ops.common.tiles import cdiv
from cvkernels.ops.common.triton_launch import Launch

_BLOCK = 1024


@triton.jit
def fold_kernel(
    weight_ptr,  # [K, C, R, S]
    bias_ptr, bn_weight_ptr, bn_bias_ptr, bn_mean_ptr, bn_var_ptr, bn_eps,  # [K]
    folded_ptr,  # [K, R, S, C]
    shift_ptr,  # [K]
    C, S,
    size,  # R * S * C
    stride_k,
    stride_c,
    stride_r,
    stride_s,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """folded = weight * scale and shift = (bias - mean) * scale + bn_bias, in float64.

    A program has BLOCK elements of one filter. Reads weight once and writes folded once.
    """
    k = tl.program_id(0).to(tl.int64)
    scale = tl.full((), 1.0, tl.float64)
    shift = tl.zeros((), tl.float64)
    if bn_var_ptr is not None:
        scale = 1.0 / tl.sqrt(tl.load(bn_var_ptr + k).to(tl.float64) + bn_eps)
    if bn_weight_ptr is not None:
        scale *= tl.load(bn_weight_ptr + k).to(tl.float64)
    if bias_ptr is not None:
        shift += tl.load(bias_ptr + k).to(tl.float64)
    if bn_mean_ptr is not None:
        shift -= tl.load(bn_mean_ptr + k).to(tl.float64)
    shift *= scale
    if bn_bias_ptr is not None:
        shift += tl.load(bn_bias_ptr + k).to(tl.float64)
    dtype = folded_ptr.dtype.element_ty

    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < size
    c = offs % C
    s = offs // C % S
    r = offs // C // S
    taps = weight_ptr + k * stride_k + c * stride_c + r * stride_r + s * stride_s
    weight = tl.load(taps, mask=mask, other=0.0).to(tl.float64)
    folded = (weight * scale).to(tl.float32).to(dtype)
    tl.store(folded_ptr + k * size + offs, folded, mask=mask)
    if tl.program_id(1) == 0:
        tl.store(shift_ptr + k, shift.to(tl.float32).to(dtype))


def plan_launch(weight: Tensor) -> Launch:
    """The launch for ``weight``, which may be on the meta device."""
    return _plan(weight.shape, weight.stride())


@functools.lru_cache(maxsize=4096)
def _plan(shape: torch.Size, strides: tuple[int, ...]) -> Launch:
    K, C, R, S = shape
    size = C * R * S
    grid = (K, cdiv(size, _BLOCK))
    return Launch(fold_kernel, grid, (C, S, size, *strides), {"BLOCK": _BLOCK})


def operands(weight: Tensor, bias: Tensor | None, bn: BatchNormParams) -> tuple[Any, ...]:
    """The arguments of the launch; the last two are the results."""
    vectors = [None if v is None else v.contiguous() for v in (bias, *bn[:4])]
    folded = torch.empty_like(weight, memory_format=torch.channels_last)
    return weight, *vectors, float(bn.eps), folded, weight.new_empty(weight.shape[0])


def fold(weight: Tensor, bias: Tensor | None, bn: BatchNormParams) -> tuple[Tensor, Tensor]:
    """Weight, channels_last, and bias of the one convolution that equals conv + batch norm.

    Both have weight's dtype; computed in float64, eps being a float32, and rounded.
    """
    arguments = operands(weight, bias, bn)
    plan_launch(weight)(*arguments)
    return arguments[-2:]
