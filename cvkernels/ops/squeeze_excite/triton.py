"""Launches the Triton kernels of se_scale and its parts.

``plan_<op>``, which takes its arguments by position, returns a function of the op's tensors, right
for any that have the layouts of those it was given, on any device; layers are the two weights, each
before its bias. ``<name>_launch`` is one launch, its docstring what it takes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cvkernels.ops.common.layout import fits, fitting, is_nhwc, new_like, pixel_stride
from cvkernels.ops.common.tiles import cdiv
from cvkernels.ops.common.triton_launch import Launch
from cvkernels.ops.squeeze_excite import tiles
from cvkernels.ops.squeeze_excite.native import matrices
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


class _Layout(NamedTuple):
    """What plans know of a tensor."""

    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype

    def on_meta(self) -> Tensor:
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device="meta")


def _kept(plan: Callable[..., Callable]) -> Callable[..., Callable]:
    """``plan``, once for all tensors of equal layouts: it is given some on the meta device."""

    @functools.lru_cache(maxsize=4096)
    def planned_once(*arguments: Any) -> Callable:
        return plan(*[a.on_meta() if isinstance(a, _Layout) else a for a in arguments])

    @functools.wraps(plan)
    def planned(*arguments: Any) -> Callable:
        layouts = [
            _Layout(a.shape, a.stride(), a.dtype) if isinstance(a, Tensor) else a for a in arguments
        ]
        return planned_once(*layouts)

    return planned


@_kept
def plan_squeeze(x: Tensor) -> Callable[[Tensor], Tensor]:
    """x -> the means, in x's dtype: one launch, or two where the sum is in parts."""
    x, read = _read(x, is_nhwc(x))
    N, C, H, W = x.shape
    sums, size = squeeze_launch(x, H * W), parts_shape(x)
    finish = finish_launch(size)

    def run(x: Tensor) -> Tensor:
        x = read(x)
        out = x.new_empty((N, C))
        if size[1] == 1:
            sums(x, out)
            return out
        parts = x.new_empty(size, dtype=torch.float32)
        sums(x, parts)
        finish(parts, None, out)
        return out

    return run


@_kept
def plan_excite(
    pooled: Tensor, weight1: Tensor, act: str, sigmoid: bool, count: int | None
) -> Callable[[Tensor, tuple], Tensor]:
    """(pooled, layers) -> the logits, or their sigmoid."""
    N, C = pooled.shape
    launch = excite_launch((N, 1, C), weight1.shape[0], act, sigmoid, count or 1)
    dtype = pooled.dtype if count is None else weight1.dtype

    def run(pooled: Tensor, layers: tuple) -> Tensor:
        out = pooled.new_empty((N, C), dtype=dtype)
        launch(pooled.contiguous(), *matrices(*layers), out, None)
        return out

    return run


@_kept
def plan_se_scale(
    x: Tensor, residual: Tensor | None, act: str, out: Tensor | None = None
) -> Callable[..., Tensor]:
    """(x, gate, residual=None, out=None, shift=None) -> the output, to which shift[N, C] is added;
    out is one that x's kernels can write."""
    nhwc = is_nhwc(x)
    x, read = _read(x, nhwc)
    residual, read_residual = _read(residual, nhwc)
    made = new_like(x) if out is None else out
    launch, shape, strides = se_scale_launch(x, residual, act, made), made.shape, made.stride()

    def run(x, gate, residual=None, out=None, shift=None):
        out = x.new_empty_strided(shape, strides) if out is None else out
        launch(read(x), gate.contiguous(), shift, read_residual(residual), out)
        return out

    return run


@_kept
def plan_squeeze_excite(
    x: Tensor, R: int, act: str, residual: Tensor | None, out_act: str, out: Tensor | None,
    keep_mean: bool, whole_images: bool,
) -> Callable[..., tuple[Tensor, Tensor | None, Tensor]]:  # fmt: skip
    """(x, layers, residual, out=None) -> (out, the means where they are kept, the logits), the last
    two in float32. One launch or three, as :func:`tiles.one_launch` says.
    """
    x, read = _read(x, is_nhwc(x))
    N, C, H, W = x.shape
    if whole_images:
        fitted, read_residual = _read(residual, True)
        made = new_like(x) if out is None else out
        shape, strides = made.shape, made.stride()
        image = image_launch(x, R, act, fitted, out_act, made)
    else:
        size = parts_shape(x)
        sums, hidden = squeeze_launch(x, 1), excite_launch(size, R, act, False, H * W)
        scale = plan_se_scale(x, residual, out_act, out)

    def run(x, layers, residual, out=None):
        x, layers = read(x), matrices(*layers)
        gate = x.new_empty((N, C), dtype=torch.float32)
        mean = torch.empty_like(gate) if keep_mean else None
        if whole_images:
            out = x.new_empty_strided(shape, strides) if out is None else out
            image(x, *layers, read_residual(residual), out, gate, mean)
            return out, mean, gate
        parts = x.new_empty(size, dtype=torch.float32)
        sums(x, parts)
        hidden(parts, *layers, gate, mean)
        return scale(x, gate, residual, out), mean, gate

    return run


@_kept
def plan_se_scale_backward(
    grad: Tensor, x: Tensor, residual: Tensor | None, out: Tensor | None, act: str, input_grad: bool
) -> Callable[[tuple, Tensor], tuple[Tensor, Tensor, Tensor]]:
    """((grad, x, residual, out), gate) -> (d x where it is wanted, d gate, d residual unless it is
    grad); what is not made is empty."""
    nhwc = is_nhwc(x)
    maps, readers = zip(*(_read(t, nhwc) for t in (grad, x, residual, out)), strict=True)
    launch = backward_launch(maps[0], maps[1], maps[2], maps[3], act)
    size = parts_shape(maps[1], tiles.BACKWARD)
    finish = finish_launch(size)
    shape, strides = x.shape, new_like(maps[1]).stride()

    def run(maps: tuple, gate: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        grad, x, residual, out = (read(t) for read, t in zip(readers, maps, strict=True))
        gate = gate.contiguous()
        dx = x.new_empty_strided(shape, strides) if input_grad else None
        dz = x.new_empty_strided(shape, strides) if act != "none" else None
        parts = x.new_empty(size, dtype=torch.float32)
        launch(grad, x, gate, residual, out, dx, dz, parts)
        d_gate = torch.empty_like(gate)
        finish(parts, gate, d_gate)
        nothing = x.new_empty(0)
        return nothing if dx is None else dx, d_gate, x.new_empty(0) if dz is None else dz

    return run


def parts_shape(x: Tensor, elements: int = tiles.SQUEEZE) -> tuple[int, int, int]:
    """Of the partial sums of x: [N, parts, C]."""
    return x.shape[0], tiles.parts_of(x, elements), x.shape[1]


def squeeze_launch(x: Tensor, divisor: int) -> Launch:
    """(x, sums), which are in as many parts as :func:`parts_shape` says, divided."""
    N, C, H, W = x.shape
    HW = H * W
    if not is_nhwc(x):
        rows, block_p = tiles.planes(HW, tiles.SQUEEZE)
        meta = {"BLOCK_ROWS": rows, "BLOCK_P": block_p, **_REGISTERS}
        fixed = (N * C, HW, float(divisor))
        return Launch(squeeze_nchw_kernel, (cdiv(N * C, rows),), fixed, meta)
    tile = tiles.reduction(N, C, HW, tiles.vec_of(x), tiles.SQUEEZE)
    sizes = (HW, C // tile.vec, *_packs(tile.vec, x), tile.pixels_per_part, tile.parts)
    grid = (N * tile.parts * cdiv(C, tile.block_c),)
    return Launch(squeeze_nhwc_kernel, grid, (*sizes, float(divisor)), _blocks(tile))


def finish_launch(parts: tuple[int, int, int]) -> Launch:
    """(parts, gate, out), of parts in this shape."""
    N, count, C = parts
    grid = (N * cdiv(C, _FINISH_BLOCK),)
    return Launch(squeeze_finish_kernel, grid, (C, count), {"BLOCK_C": _FINISH_BLOCK})


def excite_launch(
    parts: tuple[int, int, int], R: int, act: str, sigmoid: bool, divisor: int
) -> Launch:
    """(parts, weight1, bias1, weight2, bias2, out, mean): both layers on the sums / divisor."""
    N, count, C = parts
    block_c, splits = tiles.excite(N, C, R)
    c_per_program = cdiv(cdiv(C, splits), block_c) * block_c
    splits = cdiv(C, c_per_program)
    fixed = (C, R, count, float(divisor), splits, c_per_program)
    meta = {"ACT": act, "SIGMOID": sigmoid, "BLOCK_C": block_c, "BLOCK_R": tiles.block_r(R)}
    return Launch(excite_kernel, (N * splits,), fixed, meta)


def image_launch(
    x: Tensor, R: int, act: str, residual: Tensor | None, out_act: str, out: Tensor
) -> Launch:
    """(x, weight1, bias1, weight2, bias2, residual, out, gate, mean): a program for each image."""
    N, C, H, W = x.shape
    tile = tiles.elementwise(C, H * W, tiles.vec_of(x, residual, out), widest=64)
    fixed = (H * W, C // tile.vec, R, *_packs(tile.vec, x, residual, out))
    meta = {"ACT": act, "OUT_ACT": out_act, "BLOCK_R": tiles.block_r(R), "num_warps": 8}
    return Launch(squeeze_excite_image_nhwc_kernel, (N,), fixed, {**meta, **_blocks(tile)})


def se_scale_launch(x: Tensor, residual: Tensor | None, act: str, out: Tensor) -> Launch:
    """(x, gate, shift, residual, out)."""
    N, C, H, W = x.shape
    HW = H * W
    if not is_nhwc(x):
        rows, block_p = tiles.planes(HW, 4096)
        meta = {"ACT": act, "BLOCK_ROWS": rows, "BLOCK_P": block_p, **_REGISTERS}
        grid = (cdiv(N * C, rows) * cdiv(HW, block_p),)
        return Launch(se_scale_nchw_kernel, grid, (N * C, HW), meta)
    tile = tiles.elementwise(C, HW, tiles.vec_of(x, residual, out))
    fixed = (HW, C // tile.vec, *_packs(tile.vec, x, residual, out))
    grid = (N * cdiv(HW, tile.block_p) * cdiv(C, tile.block_c),)
    return Launch(se_scale_nhwc_kernel, grid, fixed, {"ACT": act, **_blocks(tile)})


def backward_launch(
    grad: Tensor, x: Tensor, residual: Tensor | None, out: Tensor | None, act: str
) -> Launch:
    """(grad, x, gate, residual, out, dx, dz, parts)."""
    N, C, H, W = x.shape
    HW = H * W
    if not is_nhwc(x):
        rows, block_p = tiles.planes(HW, tiles.BACKWARD)
        meta = {"ACT": act, "BLOCK_ROWS": rows, "BLOCK_P": block_p, **_REGISTERS}
        return Launch(se_scale_bwd_nchw_kernel, (cdiv(N * C, rows),), (N * C, HW), meta)
    tile = tiles.reduction(N, C, HW, tiles.vec_of(grad, x, residual, out), tiles.BACKWARD)
    strides = _packs(tile.vec, grad, x, residual, out)
    fixed = (HW, C // tile.vec, *strides, tile.pixels_per_part, tile.parts)
    grid = (N * tile.parts * cdiv(C, tile.block_c),)
    return Launch(se_scale_bwd_nhwc_kernel, grid, fixed, {"ACT": act, **_blocks(tile)})


def _read(x: Tensor | None, nhwc: bool) -> tuple[Any, Callable[[Any], Any]]:
    """(x as the kernels read it, what makes that of a tensor with x's layout)."""
    if x is None or fits(x, nhwc):
        return x, lambda x: x
    return fitting(x, nhwc), lambda x: fitting(x, nhwc)


def _packs(vec: int, *maps: Tensor | None) -> list[int]:
    """In packs, the strides of images and of pixels of each map."""
    strides = []
    for x in maps:
        step = 0 if x is None else pixel_stride(x)
        assert step is not None, "the maps fit"
        strides += [0 if x is None else x.stride(0) // vec, step // vec]
    return strides


def _blocks(tile: tiles.Tile) -> dict[str, int]:
    return {"VEC": tile.vec, "BLOCK_P": tile.block_p, "BLOCK_C": tile.block_c, **_REGISTERS}
