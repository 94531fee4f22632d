"""Squeeze and scale on a GPU; the layers are in :mod:`triton_excite`, gradients in
:mod:`triton_backward`.

Letters: x, residual and out[N, C, HW], gate[N, C] (logits). A pointer that the call does not have
is None. Maps come in two layouts, each with kernels of its own:

- ``_nhwc``: channels are neighbours in memory, and the pixels of an image have one stride. C and
  the strides are given in packs of VEC elements, so that accesses of VEC elements are known to be
  aligned.
- ``_nchw``: dense planes; plane = n * C + c.

A reduction over HW is split over programs where there are few maps: each writes its part, and the
kernel that needs the sum adds the parts in a fixed order. No atomics: equal inputs give equal bits.
Offsets of images and pixels are int64.
"""

import triton
import triton.language as tl

UNSPECIALIZED = ["HW", "pixels_per_part", "parts"]


@triton.jit
def sigmoid(y):
    return tl.sigmoid(y)


@triton.jit
def silu(y):
    return y / (1.0 + tl.exp(-y))


@triton.jit
def activate(y, ACT: tl.constexpr):
    if ACT == "relu":
        y = tl.maximum(y, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACT == "silu":
        y = silu(y)
    else:
        tl.static_assert(ACT == "none")
    return y


@triton.jit
def load_tile(ptr, offs, mask):
    """A tile in float32; zeros where there is no tensor."""
    if ptr is None:
        return tl.zeros(offs.shape, tl.float32)
    else:
        return tl.load(ptr + offs, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_tile(ptr, offs, value, mask):
    tl.store(ptr + offs, value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_scale(gate_ptr, offs, mask):
    # fp32: sigmoid in half precision loses the small gates
    return sigmoid(tl.load(gate_ptr + offs, mask=mask, other=0.0).to(tl.float32))


@triton.jit
def split_program(C, parts, BLOCK_C: tl.constexpr):
    """(n, part, c_offs) of this program; neighbouring programs have neighbouring channels."""
    c_blocks = tl.cdiv(C, BLOCK_C)
    pid = tl.program_id(0)
    c_offs = (pid % c_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    rest = pid // c_blocks
    return (rest // parts).to(tl.int64), rest % parts, c_offs


@triton.jit
def tile_offsets(n, p_offs, c_offs, stride_n, stride_p, VEC: tl.constexpr):
    """Offsets [pixels, channels] into an NHWC map whose strides are given in packs."""
    pixels = p_offs.to(tl.int64) * stride_p * VEC
    return (n * stride_n * VEC + pixels)[:, None] + c_offs[None, :]


@triton.jit(do_not_specialize=UNSPECIALIZED)
def squeeze_nhwc_kernel(
    x_ptr,  # [N, HW, C]
    out_ptr,  # [N, parts, C]
    HW, c_packs,
    x_stride_n, x_stride_p,
    pixels_per_part, parts, divisor,
    VEC: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program sums BLOCK_C channels of one image over the pixels of one part, and divides."""
    C = c_packs * VEC
    n, part, c_offs = split_program(C, parts, BLOCK_C)
    c_mask = c_offs < C
    first = part * pixels_per_part
    last = tl.minimum(first + pixels_per_part, HW)
    acc = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for start in tl.range(first, last, BLOCK_P, num_stages=STAGES):
        p_offs = start + tl.arange(0, BLOCK_P)
        mask = (p_offs < last)[:, None] & c_mask[None, :]
        offs = tile_offsets(n, p_offs, c_offs, x_stride_n, x_stride_p, VEC)
        acc += load_tile(x_ptr, offs, mask)
    out_offs = (n * parts + part) * C + c_offs
    store_tile(out_ptr, out_offs, tl.sum(acc, axis=0) / divisor, c_mask)


@triton.jit(do_not_specialize=["planes"])
def squeeze_nchw_kernel(
    x_ptr,  # [planes, HW]
    out_ptr,  # [planes]
    planes, HW, divisor,
    BLOCK_ROWS: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """One program sums BLOCK_ROWS whole planes, and divides."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_mask = rows < planes
    acc = tl.zeros((BLOCK_ROWS, BLOCK_P), tl.float32)
    for start in range(0, HW, BLOCK_P):
        p_offs = start + tl.arange(0, BLOCK_P)
        mask = row_mask[:, None] & (p_offs < HW)[None, :]
        acc += load_tile(x_ptr, rows[:, None] * HW + p_offs[None, :], mask)
    store_tile(out_ptr, rows, tl.sum(acc, axis=1) / divisor, row_mask)


@triton.jit(do_not_specialize=["parts"])
def squeeze_finish_kernel(
    parts_ptr,  # [N, parts, C]
    gate_ptr,  # [N, C]
    out_ptr,  # [N, C]
    C,
    parts,
    BLOCK_C: tl.constexpr,
):
    """The sum over the parts; times the slope of gate's sigmoid, where there is a gate."""
    c_blocks = tl.cdiv(C, BLOCK_C)
    n = (tl.program_id(0) // c_blocks).to(tl.int64)
    c_offs = (tl.program_id(0) % c_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = c_offs < C
    acc = tl.zeros((BLOCK_C,), tl.float32)
    for part in range(0, parts):
        acc += load_tile(parts_ptr, (n * parts + part) * C + c_offs, mask)
    if gate_ptr is not None:
        scale = load_scale(gate_ptr, n * C + c_offs, mask)
        acc *= scale * (1.0 - scale)
    store_tile(out_ptr, n * C + c_offs, acc, mask)


@triton.jit(do_not_specialize=["HW"])
def se_scale_nhwc_kernel(
    x_ptr,  # [N, HW, C], as residual and out
    gate_ptr,  # [N, C]
    shift_ptr,  # [N, C]
    residual_ptr,
    out_ptr,
    HW, c_packs,
    x_stride_n, x_stride_p,
    residual_stride_n, residual_stride_p,
    out_stride_n, out_stride_p,
    ACT: tl.constexpr,
    VEC: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out = act(x * sigmoid(gate) + shift + residual). One program makes BLOCK_P x BLOCK_C of it.

    Reads x and residual once and writes out once: the minimum for this op.
    """
    C = c_packs * VEC
    n, block, c_offs = split_program(C, tl.cdiv(HW, BLOCK_P), BLOCK_C)
    c_mask = c_offs < C
    p_offs = block * BLOCK_P + tl.arange(0, BLOCK_P)
    mask = (p_offs < HW)[:, None] & c_mask[None, :]
    offs = tile_offsets(n, p_offs, c_offs, x_stride_n, x_stride_p, VEC)
    y = load_tile(x_ptr, offs, mask) * load_scale(gate_ptr, n * C + c_offs, c_mask)[None, :]
    if shift_ptr is not None:
        y += load_tile(shift_ptr, n * C + c_offs, c_mask)[None, :]
    if residual_ptr is not None:
        offs = tile_offsets(n, p_offs, c_offs, residual_stride_n, residual_stride_p, VEC)
        y += load_tile(residual_ptr, offs, mask)
    offs = tile_offsets(n, p_offs, c_offs, out_stride_n, out_stride_p, VEC)
    store_tile(out_ptr, offs, activate(y, ACT), mask)


@triton.jit(do_not_specialize=["planes"])
def se_scale_nchw_kernel(
    x_ptr,  # [planes, HW], as residual and out
    gate_ptr,  # [planes]
    shift_ptr,  # [planes]
    residual_ptr,
    out_ptr,
    planes, HW,
    ACT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """The same for dense planes: BLOCK_ROWS planes, BLOCK_P pixels of each."""
    p_blocks = tl.cdiv(HW, BLOCK_P)
    pid = tl.program_id(0)
    rows = (pid // p_blocks).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    p_offs = (pid % p_blocks) * BLOCK_P + tl.arange(0, BLOCK_P)
    row_mask = rows < planes
    mask = row_mask[:, None] & (p_offs < HW)[None, :]
    offs = rows[:, None] * HW + p_offs[None, :]
    y = load_tile(x_ptr, offs, mask) * load_scale(gate_ptr, rows, row_mask)[:, None]
    if shift_ptr is not None:
        y += load_tile(shift_ptr, rows, row_mask)[:, None]
    if residual_ptr is not None:
        y += load_tile(residual_ptr, offs, mask)
    store_tile(out_ptr, offs, activate(y, ACT), mask)
