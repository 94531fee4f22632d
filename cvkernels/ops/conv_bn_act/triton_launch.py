"""Launches the Triton kernels of ``conv_bn_act``: one per call."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cvkernels import backend as backends
from cvkernels.ops.conv_bn_act import tuning
from cvkernels.ops.conv_bn_act.problem import Problem
from cvkernels.ops.conv_bn_act.triton_kernels import (
    conv_bn_act_1x1_kernel,
    conv_bn_act_filter_row_kernel,
    conv_bn_act_spatial_kernel,
)
from cvkernels.ops.conv_bn_act.tuning import Config

_KERNELS = {
    "1x1": conv_bn_act_1x1_kernel,
    "spatial": conv_bn_act_spatial_kernel,
    "filter_row": conv_bn_act_filter_row_kernel,
}
_INT32_MAX = 2**31 - 1
_NO_BN = (None, None, None, None, 0.0)


class Launch(NamedTuple):
    """One launch, not yet made: ``kernel[grid](*args, **meta)``."""

    kernel: Any
    grid: tuple[int]
    args: list
    meta: dict[str, Any]


def run(
    problem: Problem,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bn: Any | None,
    residual: Tensor | None,
    input_bn: Any | None,
    input_gate: Tensor | None,
    out: Tensor,
    *,
    precision: str,
    config: Config | None = None,
) -> None:
    """Compute the op into ``out`` with one launch, or none if ``out`` is empty.

    ``bn`` and ``input_bn`` have the attributes weight, bias, mean, var (tensors or None) and eps;
    ``precision`` is "ieee" or "tf32", for float32. Arguments are the op's, checked by it.
    """
    if out.numel() == 0:
        return
    launch = plan(
        problem,
        x,
        weight,
        bias,
        bn,
        residual,
        input_bn,
        input_gate,
        out,
        precision=precision,
        config=config,
    )
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        with torch.cuda.device(x.device):
            launch.kernel[launch.grid](*launch.args, **launch.meta)
    else:
        launch.kernel[launch.grid](*launch.args, **launch.meta)


def plan(
    problem: Problem,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bn: Any | None,
    residual: Tensor | None,
    input_bn: Any | None,
    input_gate: Tensor | None,
    out: Tensor,
    *,
    precision: str,
    config: Config | None = None,
) -> Launch:
    """The launch that :func:`run` makes; the tensors may be on the meta device.

    Raises:
        ValueError: more output pixels than a launch can index.
    """
    if config is None:
        config = tuning.choose(problem, *backends.gpu(x))
    x_strides, out_strides = x.stride(), out.stride()
    residual_strides = (0, 0, 0, 0) if residual is None else residual.stride()
    flat_out = _flat(out_strides, problem.P, problem.Q)
    if residual is not None:
        flat_out = flat_out and _flat(residual_strides, problem.P, problem.Q)
    fixed = _fixed(
        problem,
        config,
        precision,
        _flat(x_strides, problem.H, problem.W),
        flat_out,
        x_strides[1] <= x_strides[3],
    )
    # by position, in the order of the kernels' parameters: Triton binds names more slowly
    args = [x, weight, out, bias]
    args += _NO_BN if bn is None else (bn.weight, bn.bias, bn.mean, bn.var, bn.eps)
    args.append(residual)
    args += (
        _NO_BN
        if input_bn is None
        else (input_bn.weight, input_bn.bias, input_bn.mean, input_bn.var, input_bn.eps)
    )
    args.append(input_gate)
    args += fixed.sizes
    args += x_strides
    args += weight.stride()[: fixed.weight_axes]
    args += out_strides
    args += residual_strides
    args += (0, 0) if input_gate is None else input_gate.stride()
    return Launch(fixed.kernel, fixed.grid, args, fixed.meta)


class _Fixed(NamedTuple):
    """The part of a launch that does not depend on the call's tensors."""

    kernel: Any
    grid: tuple[int]
    sizes: tuple[int, ...]
    weight_axes: int
    meta: dict[str, Any]


@functools.lru_cache(maxsize=4096)
def _fixed(
    problem: Problem,
    config: Config,
    precision: str,
    flat_x: bool,
    flat_out: bool,
    channels_inner: bool,
) -> _Fixed:
    p, name = problem, tuning.kernel(problem)
    pixels = p.N * p.P * p.Q
    tiles = _cdiv(pixels, config.block_m) * _cdiv(p.K, config.block_n)
    if pixels > _INT32_MAX - config.block_m or tiles > _INT32_MAX:
        raise ValueError(
            f"conv_bn_act: out may have at most 2^31 pixels N * P * Q for the Triton kernels, "
            f"got {p.N} * {p.P} * {p.Q}; split the batch"
        )
    meta: dict[str, Any] = {
        "STRIDE_H": p.stride[0],
        "STRIDE_W": p.stride[1],
        "ACT": p.act,
        "PRECISION": precision,
        "INPUT_BN": p.has_input_bn,
        "FLAT_OUT": flat_out,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "GROUP_M": config.group_m,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
    even = p.groups == 1 and p.C % config.block_k == 0
    if name == "1x1":
        sizes = (pixels, p.C, p.K, p.P, p.Q)
        uniform = p.has_input_gate and p.P * p.Q % config.block_m == 0
        meta.update(EVEN_C=even, FLAT_X=flat_x and p.stride == (1, 1), GATE_UNIFORM=uniform)
    else:
        meta.update(
            R=p.R,
            S=p.S,
            PADDING_H=p.padding[0],
            PADDING_W=p.padding[1],
            DILATION_H=p.dilation[0],
            DILATION_W=p.dilation[1],
        )
    if name == "spatial":
        sizes = (pixels, p.C, p.K, p.H, p.W, p.P, p.Q)
        meta.update(
            C_GROUP=p.C // p.groups,
            K_GROUP=p.K // p.groups if p.groups > 1 else 0,
            C_STEPS=_cdiv(tuning.group_span(p, config.block_n), config.block_k),
            EVEN_C=even,
        )
    elif name == "filter_row":
        sizes = (pixels, p.K, p.H, p.W, p.P, p.Q)
        row = 1 << max(p.S * p.C - 1, 15).bit_length()
        meta.update(C=p.C, CHANNELS_INNER=channels_inner, BLOCK_K=row)
    kernel = _KERNELS[name]
    return _Fixed(kernel, (tiles,), sizes, 2 if name == "1x1" else 4, meta)


def _flat(strides: tuple[int, ...], height: int, width: int) -> bool:
    """Whether the pixels of a whole batch, row by row, lie at one common stride."""
    return strides[2] == width * strides[3] and strides[0] == height * strides[2]


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)
