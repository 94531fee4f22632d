"""Launches the Triton kernel of ``depthwise_conv_bn_act``: one per call, and one to add bands."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from cvkernels import backend as backends
from cvkernels.ops.common.norm import BatchNormParams
from cvkernels.ops.depthwise_conv_bn_act.problem import DepthwiseProblem
from cvkernels.ops.depthwise_conv_bn_act.tiling import Tiling, cdiv, tiling
from cvkernels.ops.depthwise_conv_bn_act.triton_kernels import depthwise_conv_bn_act_kernel

# By the filter's size and stride, for elements of 2 and of 4 bytes: without a limit some ptxas aim
# at fewer registers, and spill to get there, others take more than two programs have; with a much
# higher one they hoist loads until they spill. These hold for those of Triton 3.6 and of 3.8.
_REGISTERS = {
    2: {(3, (1, 1)): 128, (3, (2, 2)): 96, (5, (1, 1)): 136, (5, (2, 2)): 96},
    4: {(3, (1, 1)): 108, (3, (2, 2)): 80, (5, (1, 1)): 96, (5, (2, 2)): 128},
}


class Launch(NamedTuple):
    """One launch, not yet made: ``kernel[grid](*args, **meta)``."""

    kernel: Any
    grid: tuple[int]
    args: list
    meta: dict[str, Any]


def run(
    problem: DepthwiseProblem,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bn: BatchNormParams | None,
    out: Tensor,
    sums: Tensor | None,
    tiles: Tiling | None = None,
) -> None:
    """Compute the op into ``out`` and ``sums``, neither of which is empty.

    weight is [R, S, C] or a view of it in that order. Arguments are the op's, checked by it.
    """
    tiles = tiles or tiling(problem, backends.gpu(x)[1])
    parts = sums
    if sums is not None and tiles.bands > 1:
        parts = sums.new_empty((problem.N, tiles.bands, problem.C))
    launch = plan(problem, x, weight, bias, bn, out, parts, tiles)
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        with torch.cuda.device(x.device):
            launch.kernel[launch.grid](*launch.args, **launch.meta)
    else:
        launch.kernel[launch.grid](*launch.args, **launch.meta)
    if parts is not sums:
        torch.sum(parts, 1, out=sums)


def plan(
    problem: DepthwiseProblem,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bn: BatchNormParams | None,
    out: Tensor,
    parts: Tensor | None,
    tiles: Tiling,
) -> Launch:
    """The launch that :func:`run` makes; the tensors may be on the meta device."""
    p = problem
    # by position, in the order of the kernel's parameters: Triton binds names more slowly
    args = [x, weight, out, parts, bias]
    args += (None, None, None, None, 0.0) if bn is None else bn
    x_n, x_c, x_h, x_w = x.stride()
    weight_r, weight_s, weight_c = weight.stride()
    out_n, out_c, out_h, out_w = out.stride()
    steps = x_n | x_h | x_w | weight_r | weight_s | out_n | out_h | out_w
    vec = 1 if (p.C | steps) % 8 else 8
    args += (p.C // vec, p.H, p.W, p.P, p.Q, tiles.bands, tiles.band_rows)
    args += (x_n // vec, x_c, x_h // vec, x_w // vec)
    args += (weight_c, weight_r // vec, weight_s // vec)
    args += (out_n // vec, out_c, out_h // vec, out_w // vec)
    meta = {
        "K": p.R,
        "STRIDE_H": p.stride[0],
        "STRIDE_W": p.stride[1],
        "PADDING_H": p.padding[0],
        "PADDING_W": p.padding[1],
        "DILATION_H": p.dilation[0],
        "DILATION_W": p.dilation[1],
        "ACT": p.act,
        "VEC": vec,
        "EVEN_C": p.C % tiles.block_c == 0,
        "BLOCK_P": tiles.block_p,
        "BLOCK_Q": tiles.block_q,
        "BLOCK_C": tiles.block_c,
        "num_warps": tiles.num_warps,
    }
    limit = _REGISTERS[p.dtype.itemsize].get((p.R, p.stride))
    if limit is not None:
        # no more than lets an SM hold two programs
        meta["maxnreg"] = min(limit, 65536 // (2 * 32 * tiles.num_warps))
    grid = p.N * tiles.bands * cdiv(p.C, tiles.block_c)
    return Launch(depthwise_conv_bn_act_kernel, (grid,), args, meta)
