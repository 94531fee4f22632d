"""Launches the Triton kernels of ``conv_bn_act``: one per call."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

from torch import Tensor

from cvkernels import backend as backends
from cvkernels.ops.common.norm import BatchNormParams
from cvkernels.ops.common.tiles import INT32_MAX, cdiv, power_of_two
from cvkernels.ops.common.triton_launch import Launch, norm_operands
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

Strides = tuple[int, ...]


class Planned(NamedTuple):
    """A planned call, for any tensors with the strides that it was planned for."""

    launch: Launch

    @staticmethod
    def operands(
        x: Tensor, weight: Tensor, bias: Tensor | None, bn: BatchNormParams | None,
        residual: Tensor | None, input_bn: BatchNormParams | None, input_gate: Tensor | None,
        out: Tensor,
    ) -> tuple[Tensor | float | None, ...]:  # fmt: skip
        """The arguments in the order of the kernels' first parameters."""
        norm, input_norm = norm_operands(bn), norm_operands(input_bn)
        return x, weight, out, bias, *norm, residual, *input_norm, input_gate

    def __call__(self, *arguments: Any) -> None:
        """Compute the op; takes what :meth:`operands` takes."""
        self.launch(*self.operands(*arguments))


def run(problem: Problem, *operands: Any, precision: str, config: Config | None = None) -> None:
    """Compute the op into its output with one launch, or none if that is empty.

    Takes what :meth:`Planned.operands` takes, checked by the op; the rest is as of
    :func:`plan_launch`.
    """
    x, weight, _, _, residual, _, gate, out = operands
    if out.numel():
        like = (problem, x, weight, residual, gate, out)
        plan_launch(*like, precision=precision, config=config)(*operands)


def plan_launch(
    problem: Problem,
    x: Tensor, weight: Tensor, residual: Tensor | None, input_gate: Tensor | None, out: Tensor, *,
    precision: str, config: Config | None = None,
) -> Planned:  # fmt: skip
    """The call for tensors with these strides, which may be on the meta device.

    ``precision`` is "ieee" or "tf32", for float32; ``config`` is :func:`tuning.choose`'s if None.

    Raises:
        ValueError: more output pixels than a launch can index.
    """
    config = config or tuning.choose(problem, *backends.gpu(x))
    of_residual = (0, 0, 0, 0) if residual is None else residual.stride()
    of_gate = (0, 0) if input_gate is None else input_gate.stride()
    strides = (x.stride(), weight.stride(), out.stride(), of_residual, of_gate)
    return _plan(problem, config, precision, strides)


@functools.lru_cache(maxsize=4096)
def _plan(
    problem: Problem, config: Config, precision: str, strides: tuple[Strides, ...]
) -> Planned:
    """``strides`` are those of x, weight, out, residual and gate, 0 where there is none."""
    p, name = problem, tuning.kernel(problem)
    x_strides, weight_strides, out_strides, residual_strides, gate_strides = strides
    pixels = p.N * p.P * p.Q
    tiles = cdiv(pixels, config.block_m) * cdiv(p.K, config.block_n)
    if pixels > INT32_MAX - config.block_m or tiles > INT32_MAX:
        raise ValueError(
            f"conv_bn_act: out may have at most 2^31 pixels N * P * Q for the Triton kernels, "
            f"got {p.N} * {p.P} * {p.Q}; split the batch"
        )
    # strides of a residual that is not there count as flat
    flat_out = _flat(out_strides, p.P, p.Q) and _flat(residual_strides, p.P, p.Q)
    meta: dict[str, Any] = {
        "STRIDE_H": p.stride[0], "STRIDE_W": p.stride[1], "ACT": p.act, "PRECISION": precision,
        "INPUT_BN": p.has_input_bn, "FLAT_OUT": flat_out, "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n, "BLOCK_K": config.block_k, "GROUP_M": config.group_m,
        "num_warps": config.num_warps, "num_stages": config.num_stages,
    }  # fmt: skip
    even = p.groups == 1 and p.C % config.block_k == 0
    if name == "1x1":
        sizes: tuple[int, ...] = (pixels, p.C, p.K, p.P, p.Q)
        weight_strides = weight_strides[:2]
        uniform = p.has_input_gate and p.P * p.Q % config.block_m == 0
        flat_x = p.stride == (1, 1) and _flat(x_strides, p.H, p.W)
        meta.update(EVEN_C=even, FLAT_X=flat_x, GATE_UNIFORM=uniform)
    else:
        meta.update(R=p.R, S=p.S, PADDING_H=p.padding[0], PADDING_W=p.padding[1])
        meta.update(DILATION_H=p.dilation[0], DILATION_W=p.dilation[1])
    if name == "spatial":
        sizes = (pixels, p.C, p.K, p.H, p.W, p.P, p.Q)
        meta.update(
            C_GROUP=p.C // p.groups,
            K_GROUP=p.K // p.groups if p.groups > 1 else 0,
            C_STEPS=cdiv(tuning.group_span(p, config.block_n), config.block_k),
            EVEN_C=even,
        )
    elif name == "filter_row":
        sizes = (pixels, p.K, p.H, p.W, p.P, p.Q)
        row = power_of_two(max(p.S * p.C, 16))
        meta.update(C=p.C, CHANNELS_INNER=x_strides[1] <= x_strides[3], BLOCK_K=row)
    fixed = (
        *sizes, *x_strides, *weight_strides, *out_strides, *residual_strides, *gate_strides
    )  # fmt: skip
    return Planned(Launch(_KERNELS[name], (tiles,), fixed, meta))


def _flat(strides: Strides, height: int, width: int) -> bool:
    """Whether the pixels of a whole batch, row by row, lie at one common stride."""
    return strides[2] == width * strides[3] and strides[0] == height * strides[2]
