"""Launches the Triton kernels of se_scale and its parts.

``plan_<op>``, which takes its arguments by position, returns a function of the op's tensors, right
for any that have the layouts of those it was given, on any GPU with as many multiprocessors; layers
are the two weights, each before its bias. ``<name>_launch`` is one launch, its docstring what it
takes.
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
from cvkernels.ops.squeeze_excite.triton_excite import (
    excite_hidden_kernel,
    excite_kernel,
    excite_out_kernel,
)
from cvkernels.ops.squeeze_excite.triton_kernels import (
    se_scale_nchw_kernel,
    se_scale_nhwc_kernel,
    squeeze_finish_kernel,
    squeeze_nchw_kernel,
    squeeze_nhwc_kernel,
)

_FINISH_BLOCK = 256


class _Layout(NamedTuple):
    """What plans know of a tensor."""

    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype

    def on_meta(self) -> Tensor:
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device="meta")


def _kept(plan: Callable[..., Callable]) -> Callable[..., Callable]:
    """``plan``, once for all tensors of equal layouts: it is given some on the meta device, and the
    GPU's multiprocessors as ``sms``."""

    @functools.lru_cache(maxsize=4096)
    def planned_once(sms: int, *arguments: Any) -> Callable:
        return plan(*[a.on_meta() if isinstance(a, _Layout) else a for a in arguments], sms=sms)

    @functools.wraps(plan)
    def planned(*arguments: Any) -> Callable:
        layouts = [
            _Layout(a.shape, a.stride(), a.dtype) if isinstance(a, Tensor) else a for a in arguments
        ]
        return planned_once(tiles.sms_of(arguments[0]), *layouts)

    return planned


@_kept
def plan_squeeze(x: Tensor, *, sms: int) -> Callable[[Tensor], Tensor]:
    """x -> the means, in x's dtype: one launch, or two where the sum is in parts."""
    x, read = _read(x, is_nhwc(x))
    N, C, H, W = x.shape
    sums, size = squeeze_launch(x, H * W, sms), parts_shape(x, sms)
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
    pooled: Tensor, weight1: Tensor, K: int, act: str, sigmoid: bool, count: int | None, *, sms: int
) -> Callable[[Tensor, tuple], Tensor]:
    """(pooled, layers) -> the logits [N, K], or their sigmoid."""
    N, C = pooled.shape
    launch = excite_launches((N, 1, C), weight1, K, act, sigmoid, count or 1, sms)
    dtype = pooled.dtype if count is None else weight1.dtype

    def run(pooled: Tensor, layers: tuple) -> Tensor:
        out = pooled.new_empty((N, K), dtype=dtype)
        launch(pooled.contiguous(), *matrices(*layers), out)
        return out

    return run


@_kept
def plan_se_scale(
    x: Tensor, residual: Tensor | None, act: str, out: Tensor | None = None, *, sms: int
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
    x: Tensor, weight1: Tensor, act: str, residual: Tensor | None, out_act: str,
    out: Tensor | None, keep_mean: bool, *, sms: int,
) -> Callable[..., tuple[Tensor, Tensor | None, Tensor]]:  # fmt: skip
    """(x, layers, residual, out=None) -> (out, the means where they are kept, the logits), the last
    two in float32. Sums in parts are added by the first layer, or before it to be kept.
    """
    scale = plan_se_scale(x, residual, out_act, out)
    x, read = _read(x, is_nhwc(x))
    N, C, H, W = x.shape
    size = parts_shape(x, sms)
    sums, finish = squeeze_launch(x, H * W, sms), finish_launch(size)
    adds_first = keep_mean and size[1] > 1
    pooled = (N, 1, C) if adds_first else size
    excite = excite_launches(pooled, weight1, C, act, False, 1, sms)

    def run(x, layers, residual, out=None):
        x = read(x)
        parts = x.new_empty(size, dtype=torch.float32)
        sums(x, parts)
        if adds_first:
            mean = x.new_empty(pooled, dtype=torch.float32)
            finish(parts, None, mean)
            parts = mean
        gate = x.new_empty((N, C), dtype=torch.float32)
        excite(parts, *matrices(*layers), gate)
        return scale(x, gate, residual, out), parts.view(N, C) if keep_mean else None, gate

    return run


@_kept
def plan_se_scale_backward(
    grad: Tensor, x: Tensor, residual: Tensor | None, out: Tensor | None, act: str,
    input_grad: bool, *, sms: int,
) -> Callable[[tuple, Tensor], tuple[Tensor, Tensor, Tensor]]:  # fmt: skip
    """((grad, x, residual, out), gate) -> (d x where it is wanted, d gate, d residual unless it is
    grad); what is not made is empty."""
    nhwc = is_nhwc(x)
    maps, readers = zip(*(_read(t, nhwc) for t in (grad, x, residual, out)), strict=True)
    launch = backward_launch(maps[0], maps[1], maps[2], maps[3], act, sms)
    size = parts_shape(maps[1], sms, tiles.BACKWARD)
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


def parts_shape(x: Tensor, sms: int, of: tiles.Pass = tiles.SQUEEZE) -> tuple[int, int, int]:
    """Of the partial sums of x: [N, parts, C]."""
    return x.shape[0], tiles.parts_of(x, sms, of), x.shape[1]


def squeeze_launch(x: Tensor, divisor: int, sms: int) -> Launch:
    """(x, sums), which are in as many parts as :func:`parts_shape` says, divided."""
    N, C, H, W = x.shape
    HW = H * W
    if not is_nhwc(x):
        rows, block_p = tiles.planes(HW, x.element_size(), tiles.SQUEEZE)
        wide = HW * x.element_size() % 16 == 0
        meta = _meta(tiles.SQUEEZE, wide, BLOCK_ROWS=rows, BLOCK_P=block_p)
        fixed = (N * C, HW, float(divisor))
        return Launch(squeeze_nchw_kernel, (cdiv(N * C, rows),), fixed, meta)
    tile = tiles.reduction(x.shape, x.element_size(), tiles.vec_of(x), tiles.SQUEEZE, sms)
    sizes = (HW, C // tile.vec, *_packs(tile.vec, x), tile.pixels_per_part, tile.parts)
    grid = (N * tile.parts * cdiv(C, tile.block_c),)
    stages = min(tiles.SQUEEZE_STAGES, tile.pixels_per_part // tile.block_p)
    meta = _meta(tiles.SQUEEZE, tile.vec > 1, STAGES=stages, **_blocks(tile))
    return Launch(squeeze_nhwc_kernel, grid, (*sizes, float(divisor)), meta)


def finish_launch(parts: tuple[int, int, int]) -> Launch:
    """(parts, gate, out), of parts in this shape."""
    N, count, C = parts
    grid = (N * cdiv(C, _FINISH_BLOCK),)
    return Launch(squeeze_finish_kernel, grid, (C, count), {"BLOCK_C": _FINISH_BLOCK})


def excite_launches(
    parts: tuple[int, int, int], weight1: Tensor, K: int, act: str, sigmoid: bool, divisor: int,
    sms: int,
) -> Callable[..., None]:  # fmt: skip
    """(parts, weight1, bias1, weight2, bias2, out): both layers on the sums / divisor."""
    (N, count, C), R = parts, weight1.shape[0]
    tile = tiles.excite(N, count, C, R, K, weight1.element_size(), sms)
    if tile.launches == 1:
        return excite_launch(parts, R, K, act, sigmoid, divisor, tile)
    first = excite_hidden_launch(parts, R, divisor, tile)
    second = excite_out_launch(N, R, K, act, sigmoid, tile)

    def run(parts, weight1, bias1, weight2, bias2, out):
        hidden = out.new_empty((tile.splits, N, R), dtype=torch.float32)
        first(parts, weight1, hidden)
        second(hidden, bias1, weight2, bias2, out)

    return run


def excite_launch(
    parts: tuple[int, int, int], R: int, K: int, act: str, sigmoid: bool, divisor: int,
    tile: tiles.Layers,
) -> Launch:  # fmt: skip
    """(parts, weight1, bias1, weight2, bias2, out)."""
    N, count, C = parts
    meta = {
        "ACT": act, "SIGMOID": sigmoid, "BLOCK_N": tile.block_n, "BLOCK_C": tile.block_c,
        "BLOCK_OUT": tile.block_out, "BLOCK_R": tile.block_r, **_product(tile),
    }  # fmt: skip
    grid = (cdiv(N, tile.block_n) * cdiv(K, tile.block_out),)
    return Launch(excite_kernel, grid, (N, C, R, K, count, float(divisor)), meta)


def excite_hidden_launch(
    parts: tuple[int, int, int], R: int, divisor: int, tile: tiles.Layers
) -> Launch:
    """(parts, weight1, hidden)."""
    N, count, C = parts
    fixed = (N, C, R, count, float(divisor), tile.steps, tile.steps_per_split)
    meta = {
        "BLOCK_N": tile.block_n, "BLOCK_C": tile.block_c, "BLOCK_R": tile.block_r,
        **_product(tile),
    }  # fmt: skip
    grid = (cdiv(N, tile.block_n) * cdiv(R, tile.block_r) * tile.splits,)
    return Launch(excite_hidden_kernel, grid, fixed, meta)


def excite_out_launch(
    N: int, R: int, K: int, act: str, sigmoid: bool, tile: tiles.Layers
) -> Launch:
    """(hidden, bias1, weight2, bias2, out)."""
    meta = {
        "ACT": act, "SIGMOID": sigmoid, "SPLITS": tile.splits, "BLOCK_N": tile.block_n,
        "BLOCK_OUT": tile.block_out, "BLOCK_R": tile.block_r, **_product(tile),
    }  # fmt: skip
    grid = (cdiv(N, tile.block_n) * cdiv(K, tile.block_out),)
    return Launch(excite_out_kernel, grid, (N, R, K), meta)


def se_scale_launch(x: Tensor, residual: Tensor | None, act: str, out: Tensor) -> Launch:
    """(x, gate, shift, residual, out)."""
    N, C, H, W = x.shape
    HW = H * W
    if not is_nhwc(x):
        rows, block_p = tiles.planes(HW, x.element_size(), tiles.SCALE)
        wide = HW * x.element_size() % 16 == 0
        meta = _meta(tiles.SCALE, wide, ACT=act, BLOCK_ROWS=rows, BLOCK_P=block_p)
        grid = (cdiv(N * C, rows) * cdiv(HW, block_p),)
        return Launch(se_scale_nchw_kernel, grid, (N * C, HW), meta)
    tile = tiles.elementwise(C, HW, x.element_size(), tiles.vec_of(x, residual, out))
    fixed = (HW, C // tile.vec, *_packs(tile.vec, x, residual, out))
    grid = (N * cdiv(HW, tile.block_p) * cdiv(C, tile.block_c),)
    meta = _meta(tiles.SCALE, tile.vec > 1, ACT=act, **_blocks(tile))
    return Launch(se_scale_nhwc_kernel, grid, fixed, meta)


def backward_launch(
    grad: Tensor, x: Tensor, residual: Tensor | None, out: Tensor | None, act: str,
    sms: int,
) -> Launch:  # fmt: skip
    """(grad, x, gate, residual, out, dx, dz, parts)."""
    N, C, H, W = x.shape
    HW = H * W
    if not is_nhwc(x):
        rows, block_p = tiles.planes(HW, x.element_size(), tiles.BACKWARD)
        wide = HW * x.element_size() % 16 == 0
        meta = _meta(tiles.BACKWARD, wide, ACT=act, BLOCK_ROWS=rows, BLOCK_P=block_p)
        return Launch(se_scale_bwd_nchw_kernel, (cdiv(N * C, rows),), (N * C, HW), meta)
    tile = tiles.reduction(
        x.shape, x.element_size(), tiles.vec_of(grad, x, residual, out), tiles.BACKWARD, sms
    )
    strides = _packs(tile.vec, grad, x, residual, out)
    fixed = (HW, C // tile.vec, *strides, tile.pixels_per_part, tile.parts)
    grid = (N * tile.parts * cdiv(C, tile.block_c),)
    meta = _meta(tiles.BACKWARD, tile.vec > 1, ACT=act, **_blocks(tile))
    return Launch(se_scale_bwd_nhwc_kernel, grid, fixed, meta)


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
    return {"VEC": tile.vec, "BLOCK_P": tile.block_p, "BLOCK_C": tile.block_c}


def _meta(of: tiles.Pass, wide: bool, **constants: Any) -> dict[str, Any]:
    """Without a limit ptxas aims at fewer registers than accesses of single elements take."""
    return {**constants, "maxnreg": of.registers if wide else 128}


def _product(tile: tiles.Layers) -> dict[str, int]:
    warps = 8 if tile.block_n > 16 else 4
    return {"STAGES": tiles.PRODUCT_STAGES, "num_warps": warps, "maxnreg": 240}
