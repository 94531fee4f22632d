"""The gradients of se_scale on a GPU; letters and layouts as in :mod:`triton_kernels`."""

import triton
import triton.language as tl

from cvkernels.ops.squeeze_excite.triton_kernels import (
    UNSPECIALIZED,
    load_scale,
    load_tile,
    sigmoid,
    split_program,
    store_tile,
    tile_offsets,
)


@triton.jit
def activation_grad(grad, x, scale, residual, out, ACT: tl.constexpr):
    """The gradient in z of act(z), z = x * scale + residual; out is relu's, where that is ACT."""
    if ACT == "relu":
        grad = tl.where(out <= 0.0, 0.0, grad)
    elif ACT == "silu":
        z = x * scale + residual
        s = sigmoid(z)
        grad = grad * s * (1.0 + z * (1.0 - s))
    else:
        tl.static_assert(ACT == "none")
    return grad


@triton.jit(do_not_specialize=UNSPECIALIZED)
def se_scale_bwd_nhwc_kernel(
    grad_ptr,  # [N, HW, C], as all maps
    x_ptr,
    gate_ptr,  # [N, C]
    residual_ptr,
    out_ptr,
    dx_ptr,  # written, as the next two
    dz_ptr,
    parts_ptr,  # [N, parts, C]
    HW, c_packs,
    grad_stride_n, grad_stride_p,
    x_stride_n, x_stride_p,
    residual_stride_n, residual_stride_p,
    out_stride_n, out_stride_p,
    pixels_per_part, parts,
    ACT: tl.constexpr,
    VEC: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dz = act'(z) * grad, dx = dz * sigmoid(gate), and the sum of dz * x over a part's pixels.

    dx and dz are dense, and written where they are wanted.
    """
    C = c_packs * VEC
    n, part, c_offs = split_program(C, parts, BLOCK_C)
    c_mask = c_offs < C
    scale = load_scale(gate_ptr, n * C + c_offs, c_mask)[None, :]
    first = part * pixels_per_part
    last = tl.minimum(first + pixels_per_part, HW)
    acc = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for start in range(first, last, BLOCK_P):
        p_offs = start + tl.arange(0, BLOCK_P)
        mask = (p_offs < last)[:, None] & c_mask[None, :]
        offs = tile_offsets(n, p_offs, c_offs, grad_stride_n, grad_stride_p, VEC)
        grad = load_tile(grad_ptr, offs, mask)
        offs = tile_offsets(n, p_offs, c_offs, x_stride_n, x_stride_p, VEC)
        x = load_tile(x_ptr, offs, mask)
        offs = tile_offsets(n, p_offs, c_offs, residual_stride_n, residual_stride_p, VEC)
        residual = load_tile(residual_ptr, offs, mask)
        offs = tile_offsets(n, p_offs, c_offs, out_stride_n, out_stride_p, VEC)
        out = load_tile(out_ptr, offs, mask)
        dz = activation_grad(grad, x, scale, residual, out, ACT)
        acc += dz * x
        dense = (n * HW + p_offs)[:, None] * C + c_offs[None, :]
        if dz_ptr is not None:
            store_tile(dz_ptr, dense, dz, mask)
        if dx_ptr is not None:
            store_tile(dx_ptr, dense, dz * scale, mask)
    store_tile(parts_ptr, (n * parts + part) * C + c_offs, tl.sum(acc, axis=0), c_mask)


@triton.jit(do_not_specialize=["planes"])
def se_scale_bwd_nchw_kernel(
    grad_ptr,  # [planes, HW], as all maps
    x_ptr,
    gate_ptr,  # [planes]
    residual_ptr,
    out_ptr,
    dx_ptr,
    dz_ptr,
    parts_ptr,  # [planes]
    planes, HW,
    ACT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """The same for BLOCK_ROWS whole planes."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_mask = rows < planes
    scale = load_scale(gate_ptr, rows, row_mask)[:, None]
    acc = tl.zeros((BLOCK_ROWS, BLOCK_P), tl.float32)
    for start in range(0, HW, BLOCK_P):
        p_offs = start + tl.arange(0, BLOCK_P)
        mask = row_mask[:, None] & (p_offs < HW)[None, :]
        offs = rows[:, None] * HW + p_offs[None, :]
        x = load_tile(x_ptr, offs, mask)
        grad = load_tile(grad_ptr, offs, mask)
        residual, out = load_tile(residual_ptr, offs, mask), load_tile(out_ptr, offs, mask)
        dz = activation_grad(grad, x, scale, residual, out, ACT)
        acc += dz * x
        if dz_ptr is not None:
            store_tile(dz_ptr, offs, dz, mask)
        if dx_ptr is not None:
            store_tile(dx_ptr, offs, dz * scale, mask)
    store_tile(parts_ptr, rows, tl.sum(acc, axis=1), row_mask)
