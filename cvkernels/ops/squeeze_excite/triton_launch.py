"""Launches the Triton kernels of se_scale and its parts; plans are launches not yet made."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from cvkernels.ops.squeeze_excite import tiles
from cvkernels.ops.squeeze_excite.layouts import (
    fitting,
    is_nhwc,
    matrices,
    new_like,
    pixel_stride,
)
from cvkernels.ops.squeeze_excite.tiles import cdiv
from cvkernels.ops.squeeze_excite.triton_backward import (
    se_scale_bwd_nchw_kernel,
    se_scale_bwd_nhwc_kernel,
)
from cvkernels.ops.squeeze_excite.triton_kernels import (
    excite_kernel,
    se_scale_nchw_kernel,
    se_scale_nhwc_kernel,
    squeeze_excite_image_nhwc_kernel,
    squeeze_finish_kernel,
    squeeze_nchw_kernel,
    squeeze_nhwc_kernel,
)

_FINISH_BLOCK = 256
# Four programs an SM. Without a limit ptxas aims at fewer, and spills to get there.
_REGISTERS = {"maxnreg": 128}


class Launch(NamedTuple):
    """One launch: ``kernel[grid](*args, **meta)``."""

    kernel: Any
    grid: tuple[int]
    args: list
    meta: dict[str, Any]

    def run(self, x: Tensor) -> None:
        """Launch on x's device; nothing where the grid is empty."""
        if self.grid[0] == 0:
            return
        if x.is_cuda and x.device.index != torch.cuda.current_device():
            with torch.cuda.device(x.device):
                self.kernel[self.grid](*self.args, **self.meta)
        else:
            self.kernel[self.grid](*self.args, **self.meta)


def squeeze(x: Tensor) -> Tensor:
    """The means, in x's dtype: one launch, or two where the sum is in parts."""
    x = fitting(x, is_nhwc(x))
    out = x.new_empty(x.shape[:2])
    if tiles.parts_of(x) == 1:
        plan_squeeze(x, out, x.shape[2] * x.shape[3]).run(x)
        return out
    parts = new_parts(x)
    plan_squeeze(x, parts, x.shape[2] * x.shape[3]).run(x)
    plan_finish(parts, None, out).run(x)
    return out


def excite(
    pooled: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    act: str,
    sigmoid: bool,
    count: int | None,
) -> Tensor:
    out = pooled.new_empty(pooled.shape, dtype=pooled.dtype if count is None else weight1.dtype)
    layers = matrices(weight1, bias1, weight2, bias2)
    parts = pooled.contiguous()[:, None]
    plan_excite(parts, *layers, out, None, act, sigmoid, count or 1).run(pooled)
    return out


def se_scale(
    x: Tensor,
    gate: Tensor,
    residual: Tensor | None,
    act: str,
    out: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """``act(x * sigmoid(gate) + shift + residual)``; out is one that x's kernels can write."""
    nhwc = is_nhwc(x)
    x = fitting(x, nhwc)
    residual = None if residual is None else fitting(residual, nhwc)
    out = new_like(x) if out is None else out
    plan_se_scale(x, gate.contiguous(), residual, act, out, shift).run(x)
    return out


def squeeze_excite(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    act: str,
    residual: Tensor | None,
    out_act: str,
    out: Tensor | None = None,
    keep_mean: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(out, the means where they are kept, the logits), the last two in float32.

    One launch or three, as :func:`tiles.one_launch` says.
    """
    nhwc = is_nhwc(x)
    x = fitting(x, nhwc)
    gate = x.new_empty(x.shape[:2], dtype=torch.float32)
    mean = torch.empty_like(gate) if keep_mean else None
    layers = matrices(weight1, bias1, weight2, bias2)
    if tiles.one_launch(x, weight1.shape[0]):
        residual = None if residual is None else fitting(residual, nhwc)
        out = new_like(x) if out is None else out
        plan_image(x, *layers, act, residual, out_act, out, gate, mean).run(x)
        return out, mean, gate
    parts = new_parts(x)
    plan_squeeze(x, parts, 1).run(x)
    plan_excite(parts, *layers, gate, mean, act, False, x.shape[2] * x.shape[3]).run(x)
    return se_scale(x, gate, residual, out_act, out), mean, gate


def se_scale_backward(
    grad: Tensor,
    x: Tensor,
    gate: Tensor,
    residual: Tensor | None,
    out: Tensor | None,
    act: str,
    input_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(d x where it is wanted, d gate, d residual unless it is grad); what is not made is empty."""
    nhwc = is_nhwc(x)
    grad, x = fitting(grad, nhwc), fitting(x, nhwc)
    residual = None if residual is None else fitting(residual, nhwc)
    out = None if out is None else fitting(out, nhwc)
    gate = gate.contiguous()
    dx = new_like(x) if input_grad else None
    dz = new_like(x) if act != "none" else None
    parts = new_parts(x, tiles.BACKWARD)
    plan_backward(grad, x, gate, residual, out, dx, dz, parts, act).run(x)
    d_gate = torch.empty_like(gate)
    plan_finish(parts, gate, d_gate).run(x)
    nothing = x.new_empty(0)
    return nothing if dx is None else dx, d_gate, x.new_empty(0) if dz is None else dz


def new_parts(x: Tensor, elements: int = tiles.SQUEEZE) -> Tensor:
    """Room for the partial sums of x: float32[N, parts, C]."""
    N, C, H, W = x.shape
    parts = tiles.reduction(N, C, H * W, 1, elements).parts if is_nhwc(x) else 1
    return x.new_empty((N, parts, C), dtype=torch.float32)


def plan_squeeze(x: Tensor, out: Tensor, divisor: int) -> Launch:
    """Sums of x, in as many parts as out has, divided by ``divisor``."""
    N, C, H, W = x.shape
    HW = H * W
    if not is_nhwc(x):
        rows, block_p = tiles.planes(HW, tiles.SQUEEZE)
        meta = {"BLOCK_ROWS": rows, "BLOCK_P": block_p, **_REGISTERS}
        args = [x, out, N * C, HW, float(divisor)]
        return Launch(squeeze_nchw_kernel, (cdiv(N * C, rows),), args, meta)
    tile = tiles.reduction(N, C, HW, tiles.vec_of(x), tiles.SQUEEZE)
    args = [x, out, HW, C // tile.vec, *_packs(x, tile.vec), tile.pixels_per_part, tile.parts]
    grid = (N * tile.parts * cdiv(C, tile.block_c),)
    return Launch(squeeze_nhwc_kernel, grid, [*args, float(divisor)], _blocks(tile))


def plan_finish(parts: Tensor, gate: Tensor | None, out: Tensor) -> Launch:
    N, count, C = parts.shape
    grid = (N * cdiv(C, _FINISH_BLOCK),)
    meta = {"BLOCK_C": _FINISH_BLOCK}
    return Launch(squeeze_finish_kernel, grid, [parts, gate, out, C, count], meta)


def plan_excite(
    parts: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    out: Tensor,
    mean: Tensor | None,
    act: str,
    sigmoid: bool,
    divisor: int,
) -> Launch:
    """Both layers on the sums parts[N, parts, C] / divisor."""
    N, count, C = parts.shape
    R = weight1.shape[0]
    block_r, block_c, splits = tiles.excite(N, C, R)
    c_per_program = cdiv(cdiv(C, splits), block_c) * block_c
    splits = cdiv(C, c_per_program)
    args = [parts, weight1, bias1, weight2, bias2, out, mean, C, R, count, float(divisor)]
    meta = {"ACT": act, "SIGMOID": sigmoid, "BLOCK_C": block_c, "BLOCK_R": block_r}
    return Launch(excite_kernel, (N * splits,), [*args, splits, c_per_program], meta)


def plan_image(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    act: str,
    residual: Tensor | None,
    out_act: str,
    out: Tensor,
    gate: Tensor | None,
    mean: Tensor | None,
) -> Launch:
    """The whole block, one program for each image; x is NHWC."""
    N, C, H, W = x.shape
    R = weight1.shape[0]
    tile, block_r = tiles.image(C, H * W, R, tiles.vec_of(x, residual, out))
    args = [x, weight1, bias1, weight2, bias2, residual, out, gate, mean, H * W, C // tile.vec, R]
    for part in (x, residual, out):
        args += _packs(part, tile.vec)
    meta = {"ACT": act, "OUT_ACT": out_act, "BLOCK_R": block_r, "num_warps": 8, **_blocks(tile)}
    return Launch(squeeze_excite_image_nhwc_kernel, (N,), args, meta)


def plan_se_scale(
    x: Tensor, gate: Tensor, residual: Tensor | None, act: str, out: Tensor, shift: Tensor | None
) -> Launch:
    N, C, H, W = x.shape
    HW = H * W
    tensors = [x, gate, shift, residual, out]
    if not is_nhwc(x):
        rows, block_p = tiles.planes(HW, 4096)
        meta = {"ACT": act, "BLOCK_ROWS": rows, "BLOCK_P": block_p, **_REGISTERS}
        grid = (cdiv(N * C, rows) * cdiv(HW, block_p),)
        return Launch(se_scale_nchw_kernel, grid, [*tensors, N * C, HW], meta)
    tile = tiles.elementwise(N, C, HW, tiles.vec_of(x, residual, out))
    args = [*tensors, HW, C // tile.vec]
    for part in (x, residual, out):
        args += _packs(part, tile.vec)
    grid = (N * cdiv(HW, tile.block_p) * cdiv(C, tile.block_c),)
    return Launch(se_scale_nhwc_kernel, grid, args, {"ACT": act, **_blocks(tile)})


def plan_backward(
    grad: Tensor,
    x: Tensor,
    gate: Tensor,
    residual: Tensor | None,
    out: Tensor | None,
    dx: Tensor | None,
    dz: Tensor | None,
    parts: Tensor,
    act: str,
) -> Launch:
    N, C, H, W = x.shape
    HW = H * W
    tensors = [grad, x, gate, residual, out, dx, dz, parts]
    if not is_nhwc(x):
        rows, block_p = tiles.planes(HW, tiles.BACKWARD)
        meta = {"ACT": act, "BLOCK_ROWS": rows, "BLOCK_P": block_p, **_REGISTERS}
        return Launch(se_scale_bwd_nchw_kernel, (cdiv(N * C, rows),), [*tensors, N * C, HW], meta)
    tile = tiles.reduction(N, C, HW, tiles.vec_of(grad, x, residual, out), tiles.BACKWARD)
    args = [*tensors, HW, C // tile.vec]
    for part in (grad, x, residual, out):
        args += _packs(part, tile.vec)
    args += [tile.pixels_per_part, tile.parts]
    grid = (N * tile.parts * cdiv(C, tile.block_c),)
    return Launch(se_scale_bwd_nhwc_kernel, grid, args, {"ACT": act, **_blocks(tile)})


def _packs(x: Tensor | None, vec: int) -> tuple[int, int]:
    """(stride of images, stride of pixels) in packs."""
    return (0, 0) if x is None else (x.stride(0) // vec, pixel_stride(x) // vec)


def _blocks(tile: tiles.Tile) -> dict[str, int]:
    return {"VEC": tile.vec, "BLOCK_P": tile.block_p, "BLOCK_C": tile.block_c, **_REGISTERS}
