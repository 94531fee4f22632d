"""Launches the Triton kernels of se_scale and its parts.

``plan_<op>`` returns a function of the op's tensors, for any that have the layouts it was planned
for; those may be on the meta device. ``<name>_launch`` is one launch of it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from cvkernels.ops.common.tiles import cdiv
from cvkernels.ops.common.triton_launch import Launch
from cvkernels.ops.squeeze_excite import tiles
from cvkernels.ops.squeeze_excite.layouts import (
    fits,
    fitting,
    is_nhwc,
    matrices,
    new_like,
    pixel_stride,
)
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

# Shape, strides and dtype, by which plans are kept.
Layout = tuple[torch.Size, tuple[int, ...], torch.dtype]

_planned_once = functools.lru_cache(maxsize=4096)


def squeeze(x: Tensor) -> Tensor:
    """The means, in x's dtype: one launch, or two where the sum is in parts."""
    return plan_squeeze(x)(x)


def plan_squeeze(x: Tensor) -> Callable[[Tensor], Tensor]:
    return _squeeze(_layout(x))


@_planned_once
def _squeeze(x_layout: Layout) -> Callable[[Tensor], Tensor]:
    x, read = _read(x_layout, _nhwc(x_layout))
    N, C, H, W = x.shape
    sums, size = squeeze_launch(x, H * W), parts_shape(x)
    if size[1] == 1:

        def run(x: Tensor) -> Tensor:
            x = read(x)
            out = x.new_empty((N, C))
            sums(x, out)
            return out

        return run
    finish = finish_launch(size)

    def run_in_parts(x: Tensor) -> Tensor:
        x = read(x)
        out, parts = x.new_empty((N, C)), x.new_empty(size, dtype=torch.float32)
        sums(x, parts)
        finish(parts, None, out)
        return out

    return run_in_parts


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
    return plan_excite(pooled, weight1, act, sigmoid, count)(pooled, weight1, bias1, weight2, bias2)


def plan_excite(
    pooled: Tensor, weight1: Tensor, act: str, sigmoid: bool, count: int | None
) -> Callable[..., Tensor]:
    """(pooled, weight1, bias1, weight2, bias2) -> the logits, or their sigmoid."""
    N, C = pooled.shape
    launch = excite_launch((N, 1, C), weight1.shape[0], act, sigmoid, count or 1)

    def run(pooled: Tensor, *layers: Tensor | None) -> Tensor:
        out = pooled.new_empty((N, C), dtype=pooled.dtype if count is None else layers[0].dtype)
        launch(pooled.contiguous(), *matrices(*layers), out, None)
        return out

    return run


def se_scale(
    x: Tensor,
    gate: Tensor,
    residual: Tensor | None,
    act: str,
    out: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """``act(x * sigmoid(gate) + shift + residual)``; out is one that x's kernels can write."""
    return plan_se_scale(x, residual, act, out)(x, gate, residual, out, shift)


def plan_se_scale(
    x: Tensor, residual: Tensor | None, act: str, out: Tensor | None = None
) -> Callable[..., Tensor]:
    """(x, gate, residual, out=None, shift=None) -> the output."""
    return _se_scale(_layout(x), _layout(residual), act, _layout(out))


@_planned_once
def _se_scale(
    x_layout: Layout, residual_layout: Layout | None, act: str, out_layout: Layout | None
) -> Callable[..., Tensor]:
    nhwc = _nhwc(x_layout)
    x, read = _read(x_layout, nhwc)
    residual, read_residual = _read(residual_layout, nhwc)
    made = new_like(x) if out_layout is None else _like(out_layout)
    launch = se_scale_launch(x, residual, act, made)
    shape, strides = made.shape, made.stride()

    def run(
        x: Tensor,
        gate: Tensor,
        residual: Tensor | None,
        out: Tensor | None = None,
        shift: Tensor | None = None,
    ) -> Tensor:
        out = x.new_empty_strided(shape, strides) if out is None else out
        launch(read(x), gate.contiguous(), shift, read_residual(residual), out)
        return out

    return run


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
    run = plan_squeeze_excite(x, weight1, act, residual, out_act, out, keep_mean)
    return run(x, weight1, bias1, weight2, bias2, residual, out)


def plan_squeeze_excite(
    x: Tensor,
    weight1: Tensor,
    act: str,
    residual: Tensor | None,
    out_act: str,
    out: Tensor | None = None,
    keep_mean: bool = False,
) -> Callable[..., tuple[Tensor, Tensor | None, Tensor]]:
    """(x, weight1, bias1, weight2, bias2, residual, out=None) -> what the op returns."""
    R = weight1.shape[0]
    plan = _in_one_launch if tiles.one_launch(x, R) else _in_three_launches
    layouts = (_layout(x), _layout(residual), _layout(out))
    return plan(*layouts, R, act, out_act, keep_mean)


@_planned_once
def _in_one_launch(
    x_layout: Layout,
    residual_layout: Layout | None,
    out_layout: Layout | None,
    R: int,
    act: str,
    out_act: str,
    keep_mean: bool,
) -> Callable[..., tuple[Tensor, Tensor | None, Tensor]]:
    x, read = _read(x_layout, True)
    residual, read_residual = _read(residual_layout, True)
    made = new_like(x) if out_layout is None else _like(out_layout)
    launch = image_launch(x, R, act, residual, out_act, made)
    shape, strides = made.shape, made.stride()

    def run(
        x: Tensor,
        weight1: Tensor,
        bias1: Tensor | None,
        weight2: Tensor,
        bias2: Tensor | None,
        residual: Tensor | None,
        out: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        gate = x.new_empty(shape[:2], dtype=torch.float32)
        mean = torch.empty_like(gate) if keep_mean else None
        out = x.new_empty_strided(shape, strides) if out is None else out
        layers = matrices(weight1, bias1, weight2, bias2)
        launch(read(x), *layers, read_residual(residual), out, gate, mean)
        return out, mean, gate

    return run


@_planned_once
def _in_three_launches(
    x_layout: Layout,
    residual_layout: Layout | None,
    out_layout: Layout | None,
    R: int,
    act: str,
    out_act: str,
    keep_mean: bool,
) -> Callable[..., tuple[Tensor, Tensor | None, Tensor]]:
    x, read = _read(x_layout, _nhwc(x_layout))
    N, C, H, W = x.shape
    size = parts_shape(x)
    sums = squeeze_launch(x, 1)
    layers_launch = excite_launch(size, R, act, False, H * W)
    scale = _se_scale(_layout(x), residual_layout, out_act, out_layout)

    def run(
        x: Tensor,
        weight1: Tensor,
        bias1: Tensor | None,
        weight2: Tensor,
        bias2: Tensor | None,
        residual: Tensor | None,
        out: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        x = read(x)
        gate = x.new_empty((N, C), dtype=torch.float32)
        mean = torch.empty_like(gate) if keep_mean else None
        parts = x.new_empty(size, dtype=torch.float32)
        sums(x, parts)
        layers_launch(parts, *matrices(weight1, bias1, weight2, bias2), gate, mean)
        return scale(x, gate, residual, out), mean, gate

    return run


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
    run = plan_se_scale_backward(grad, x, residual, out, act, input_grad)
    return run(grad, x, gate, residual, out)


def plan_se_scale_backward(
    grad: Tensor,
    x: Tensor,
    residual: Tensor | None,
    out: Tensor | None,
    act: str,
    input_grad: bool,
) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """(grad, x, gate, residual, out) -> what the op returns."""
    return _backward(*map(_layout, (grad, x, residual, out)), act, input_grad)


@_planned_once
def _backward(
    grad_layout: Layout,
    x_layout: Layout,
    residual_layout: Layout | None,
    out_layout: Layout | None,
    act: str,
    input_grad: bool,
) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    nhwc = _nhwc(x_layout)
    layouts = (grad_layout, x_layout, residual_layout, out_layout)
    maps, readers = zip(*(_read(layout, nhwc) for layout in layouts), strict=True)
    launch, size = backward_launch(*maps, act), parts_shape(maps[1], tiles.BACKWARD)
    finish = finish_launch(size)
    made = new_like(maps[1])
    shape, strides = made.shape, made.stride()

    def run(
        grad: Tensor, x: Tensor, gate: Tensor, residual: Tensor | None, out: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        maps = (grad, x, residual, out)
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
    N, C, H, W = x.shape
    parts = tiles.reduction(N, C, H * W, 1, elements).parts if is_nhwc(x) else 1
    return N, parts, C


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
    fixed = (HW, C // tile.vec, *_packs(x, tile.vec), tile.pixels_per_part, tile.parts)
    grid = (N * tile.parts * cdiv(C, tile.block_c),)
    return Launch(squeeze_nhwc_kernel, grid, (*fixed, float(divisor)), _blocks(tile))


def finish_launch(parts: tuple[int, int, int]) -> Launch:
    """(parts, gate, out), of parts in this shape."""
    N, count, C = parts
    grid = (N * cdiv(C, _FINISH_BLOCK),)
    return Launch(squeeze_finish_kernel, grid, (C, count), {"BLOCK_C": _FINISH_BLOCK})


@_planned_once
def excite_launch(
    parts: tuple[int, int, int], R: int, act: str, sigmoid: bool, divisor: int
) -> Launch:
    """(parts, weight1, bias1, weight2, bias2, out, mean): both layers on the sums / divisor."""
    N, count, C = parts
    block_r, block_c, splits = tiles.excite(N, C, R)
    c_per_program = cdiv(cdiv(C, splits), block_c) * block_c
    splits = cdiv(C, c_per_program)
    fixed = (C, R, count, float(divisor), splits, c_per_program)
    meta = {"ACT": act, "SIGMOID": sigmoid, "BLOCK_C": block_c, "BLOCK_R": block_r}
    return Launch(excite_kernel, (N * splits,), fixed, meta)


def image_launch(
    x: Tensor, R: int, act: str, residual: Tensor | None, out_act: str, out: Tensor
) -> Launch:
    """(x, weight1, bias1, weight2, bias2, residual, out, gate, mean): a program for each image."""
    N, C, H, W = x.shape
    tile, block_r = tiles.image(C, H * W, R, tiles.vec_of(x, residual, out))
    fixed = (H * W, C // tile.vec, R)
    for part in (x, residual, out):
        fixed += _packs(part, tile.vec)
    meta = {"ACT": act, "OUT_ACT": out_act, "BLOCK_R": block_r, "num_warps": 8, **_blocks(tile)}
    return Launch(squeeze_excite_image_nhwc_kernel, (N,), fixed, meta)


def se_scale_launch(x: Tensor, residual: Tensor | None, act: str, out: Tensor) -> Launch:
    """(x, gate, shift, residual, out)."""
    N, C, H, W = x.shape
    HW = H * W
    if not is_nhwc(x):
        rows, block_p = tiles.planes(HW, 4096)
        meta = {"ACT": act, "BLOCK_ROWS": rows, "BLOCK_P": block_p, **_REGISTERS}
        grid = (cdiv(N * C, rows) * cdiv(HW, block_p),)
        return Launch(se_scale_nchw_kernel, grid, (N * C, HW), meta)
    tile = tiles.elementwise(N, C, HW, tiles.vec_of(x, residual, out))
    fixed = (HW, C // tile.vec)
    for part in (x, residual, out):
        fixed += _packs(part, tile.vec)
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
    fixed = (HW, C // tile.vec)
    for part in (grad, x, residual, out):
        fixed += _packs(part, tile.vec)
    grid = (N * tile.parts * cdiv(C, tile.block_c),)
    fixed += (tile.pixels_per_part, tile.parts)
    return Launch(se_scale_bwd_nhwc_kernel, grid, fixed, {"ACT": act, **_blocks(tile)})


def _layout(x: Tensor | None) -> Layout | None:
    return None if x is None else (x.shape, x.stride(), x.dtype)


def _like(layout: Layout) -> Tensor:
    shape, strides, dtype = layout
    return torch.empty_strided(shape, strides, dtype=dtype, device="meta")


def _nhwc(layout: Layout) -> bool:
    return is_nhwc(_like(layout))


def _read(
    layout: Layout | None, nhwc: bool
) -> tuple[Tensor | None, Callable[[Tensor | None], Tensor | None]]:
    """(what the kernels read of such a map, on the meta device; what makes it of one)."""
    if layout is None or fits(x := _like(layout), nhwc):
        return None if layout is None else x, lambda x: x
    return fitting(x, nhwc), lambda x: fitting(x, nhwc)


def _packs(x: Tensor | None, vec: int) -> tuple[int, int]:
    """(stride of images, stride of pixels) in packs."""
    return (0, 0) if x is None else (x.stride(0) // vec, pixel_stride(x) // vec)


def _blocks(tile: tiles.Tile) -> dict[str, int]:
    return {"VEC": tile.vec, "BLOCK_P": tile.block_p, "BLOCK_C": tile.block_c, **_REGISTERS}
