"""Launches the Triton kernel of ``depthwise_conv_bn_act``: one per call, and one to add bands."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cvkernels import backend as backends
from cvkernels.ops.common.norm import BatchNormParams
from cvkernels.ops.common.tiles import cdiv
from cvkernels.ops.common.triton_launch import Launch, norm_operands
from cvkernels.ops.depthwise_conv_bn_act.problem import DepthwiseProblem
from cvkernels.ops.depthwise_conv_bn_act.tiling import Tiling, tiling
from cvkernels.ops.depthwise_conv_bn_act.triton_kernels import depthwise_conv_bn_act_kernel

# By the filter's size and stride, for elements of 2 and of 4 bytes: without a limit some ptxas aim
# at fewer registers, and spill to get there, others take more than two programs have; with a much
# higher one they hoist loads until they spill. These hold for those of Triton 3.6 and of 3.8.
_REGISTERS = {
    2: {(3, (1, 1)): 128, (3, (2, 2)): 96, (5, (1, 1)): 136, (5, (2, 2)): 96},
    4: {(3, (1, 1)): 108, (3, (2, 2)): 80, (5, (1, 1)): 96, (5, (2, 2)): 128},
}


class Planned(NamedTuple):
    """A planned call, for any tensors with the strides that it was planned for."""

    launch: Launch
    # Shape of the sums of bands; None where a program walks a whole map.
    bands: tuple[int, int, int] | None

    def operands(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, bn: BatchNormParams | None,
        out: Tensor, sums: Tensor | None,
    ) -> tuple[Any, ...]:  # fmt: skip
        """The arguments in the order of the kernel's first parameters, with room for sums."""
        parts = sums
        if sums is not None and self.bands is not None:
            parts = sums.new_empty(self.bands)
        return x, weight, out, parts, bias, *norm_operands(bn)

    def __call__(self, *arguments: Any) -> None:
        """Compute the op into ``out`` and ``sums``, neither of which is empty.

        Takes what :meth:`operands` takes.
        """
        operands, sums = self.operands(*arguments), arguments[-1]
        self.launch(*operands)
        parts = operands[3]
        if parts is not sums:
            torch.sum(parts, 1, out=sums)


def run(
    problem: DepthwiseProblem, x: Tensor, weight: Tensor, bias: Tensor | None,
    bn: BatchNormParams | None, out: Tensor, sums: Tensor | None, tiles: Tiling | None = None,
) -> None:  # fmt: skip
    """Compute the op into ``out`` and ``sums``, neither of which is empty.

    weight is [R, S, C] or a view of it in that order. Arguments are the op's, checked by it.
    """
    plan_launch(problem, x, weight, out, tiles)(x, weight, bias, bn, out, sums)


def plan_launch(
    problem: DepthwiseProblem, x: Tensor, weight: Tensor, out: Tensor, tiles: Tiling | None = None
) -> Planned:
    """The call for tensors with these strides, which may be on the meta device."""
    tiles = tiles or tiling(problem, backends.gpu(x)[1])
    return _plan(problem, tiles, x.stride(), weight.stride(), out.stride())


@functools.lru_cache(maxsize=4096)
def _plan(
    problem: DepthwiseProblem, tiles: Tiling,
    x_strides: tuple[int, ...], weight_strides: tuple[int, ...], out_strides: tuple[int, ...],
) -> Planned:  # fmt: skip
    p = problem
    x_n, x_c, x_h, x_w = x_strides
    weight_r, weight_s, weight_c = weight_strides
    out_n, out_c, out_h, out_w = out_strides
    steps = x_n | x_h | x_w | weight_r | weight_s | out_n | out_h | out_w
    vec = 1 if (p.C | steps) % 8 else 8
    fixed: tuple[int, ...] = (p.C // vec, p.H, p.W, p.P, p.Q, tiles.bands, tiles.band_rows)
    fixed += (x_n // vec, x_c, x_h // vec, x_w // vec)
    fixed += (weight_c, weight_r // vec, weight_s // vec)
    fixed += (out_n // vec, out_c, out_h // vec, out_w // vec)
    meta: dict[str, Any] = {
        "K": p.R, "STRIDE_H": p.stride[0], "STRIDE_W": p.stride[1],
        "PADDING_H": p.padding[0], "PADDING_W": p.padding[1],
        "DILATION_H": p.dilation[0], "DILATION_W": p.dilation[1],
        "ACT": p.act, "VEC": vec, "EVEN_C": p.C % tiles.block_c == 0, "BLOCK_P": tiles.block_p,
        "BLOCK_Q": tiles.block_q, "BLOCK_C": tiles.block_c, "num_warps": tiles.num_warps,
    }  # fmt: skip
    limit = _REGISTERS[p.dtype.itemsize].get((p.R, p.stride))
    if limit is not None:
        # no more than lets an SM hold two programs
        meta["maxnreg"] = min(limit, 65536 // (2 * 32 * tiles.num_warps))
    grid = (p.N * tiles.bands * cdiv(p.C, tiles.block_c),)
    bands = (p.N, tiles.bands, p.C) if tiles.bands > 1 else None
    return Planned(Launch(depthwise_conv_bn_act_kernel, grid, fixed, meta), bands)
