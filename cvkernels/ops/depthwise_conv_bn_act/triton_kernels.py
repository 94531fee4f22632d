"""The depthwise convolution kernel: pixels of one output row times channels, rows in registers.

Letters: x[N, C, H, W], weight[C, 1, K, K], out[N, C, P, Q], all with any strides; parts[N, bands,
C] float32. A vector or tensor that the call does not have is None. Offsets are int64. C and every
stride but the channels' are given in packs of VEC elements, so that accesses of VEC elements are
known to be aligned.
"""

import triton
import triton.language as tl

from cvkernels.ops.conv_bn_act.triton_parts import activate, affine

# sizes that only enter index arithmetic: specialising on them would recompile for no gain
_UNSPECIALIZED = ["H", "W", "P", "Q", "bands", "band_rows"]
# VEC tells all that matters
_UNALIGNED = ["c_packs"] + [f"{x}_stride_{axis}" for x in ("x", "out") for axis in "nhw"]
_UNALIGNED += ["weight_stride_r", "weight_stride_s"]


@triton.jit(do_not_specialize=_UNSPECIALIZED, do_not_specialize_on_alignment=_UNALIGNED)
def depthwise_conv_bn_act_kernel(
    x_ptr,  # [N, C, H, W]
    weight_ptr,  # [C, K, K]
    out_ptr,  # [N, C, P, Q]
    parts_ptr,  # [N, bands, C]
    bias_ptr, bn_weight_ptr, bn_bias_ptr, bn_mean_ptr, bn_var_ptr, bn_eps,  # [C]
    c_packs, H, W, P, Q, bands, band_rows,
    x_stride_n, x_stride_c, x_stride_h, x_stride_w,
    weight_stride_c, weight_stride_r, weight_stride_s,
    out_stride_n, out_stride_c, out_stride_h, out_stride_w,
    K: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr, PADDING_W: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    ACT: tl.constexpr,
    VEC: tl.constexpr,
    EVEN_C: tl.constexpr,  # BLOCK_C divides C
    BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out = act(depthwise(x) * scale + shift), and the sums of out over the rows of a band.

    One program walks one band of rows of one image for BLOCK_C channels, in tiles of BLOCK_P rows
    and BLOCK_Q columns: a row of x in a tile is loaded once for each column of the filter, and
    serves all rows of out that it belongs to. Reads x from memory once, but for the K - STRIDE_H
    rows that two bands share, and writes out once; the sums cost no traffic but parts.
    """
    pid = tl.program_id(0)
    C = c_packs * VEC
    blocks = tl.cdiv(C, BLOCK_C)
    # neighbouring programs share the pixels' cache lines
    block = pid % blocks
    band = pid // blocks % bands
    n = pid // blocks // bands
    p_begin = band * band_rows
    p_end = tl.minimum(p_begin + band_rows, P)

    c_offs = block * BLOCK_C + tl.arange(0, BLOCK_C)
    if EVEN_C:
        c_mask = tl.full((BLOCK_C,), True, tl.int1)
    else:
        c_mask = c_offs < C
    q_offs = tl.arange(0, BLOCK_Q)
    bn = (bias_ptr, bn_weight_ptr, bn_bias_ptr, bn_mean_ptr, bn_var_ptr)
    scale, shift = affine(bn, bn_eps, c_offs, c_mask)  # [BLOCK_C]
    x_image = x_ptr + n.to(tl.int64) * x_stride_n * VEC
    x_image += (c_offs.to(tl.int64) * x_stride_c)[None, :]
    out_image = out_ptr + n.to(tl.int64) * out_stride_n * VEC
    out_image += (c_offs.to(tl.int64) * out_stride_c)[None, :]
    # as wide as a tile of x: a vector's layout would differ, and be converted for each tap
    weight_ptrs = weight_ptr + (c_offs.to(tl.int64) * weight_stride_c)[None, :]
    weight_ptrs += (q_offs * 0)[:, None]
    tap_mask = (q_offs >= 0)[:, None] & c_mask[None, :]
    # the rows are plain ints in the interpreter: the strides make their offsets int64
    x_step_h = tl.full((), VEC, tl.int64) * x_stride_h
    out_step_h = tl.full((), VEC, tl.int64) * out_stride_h
    ROWS: tl.constexpr = (BLOCK_P - 1) * STRIDE_H + (K - 1) * DILATION_H + 1

    sums = tl.zeros((BLOCK_Q, BLOCK_C), tl.float32)
    for p_start in range(p_begin, p_end, BLOCK_P):
        for q_start in range(0, Q, BLOCK_Q):
            acc = ()
            for _ in tl.static_range(BLOCK_P):
                acc = acc + (tl.zeros((BLOCK_Q, BLOCK_C), tl.float32),)
            for s in range(K):
                iw = (q_start + q_offs) * STRIDE_W + (s * DILATION_W - PADDING_W)
                column_mask = ((iw >= 0) & (iw < W))[:, None] & c_mask[None, :]
                columns = x_image + (iw.to(tl.int64) * x_stride_w * VEC)[:, None]
                taps = ()
                for r in tl.static_range(K):
                    tap_ptrs = weight_ptrs + (r * weight_stride_r + s * weight_stride_s) * VEC
                    tap = tl.load(tap_ptrs, mask=tap_mask, other=0.0)
                    taps = taps + (tap.to(tl.float32),)  # [BLOCK_Q, BLOCK_C]
                for row in tl.static_range(ROWS):
                    ih = p_start * STRIDE_H + (row - PADDING_H)
                    mask = column_mask & ((ih >= 0) & (ih < H))
                    x = tl.load(columns + ih * x_step_h, mask=mask, other=0.0)
                    x = x.to(tl.float32)  # [BLOCK_Q, BLOCK_C]
                    updated = ()
                    for p in tl.static_range(BLOCK_P):
                        # row = p * STRIDE_H + r * DILATION_H for the filter's row r
                        if (
                            row >= p * STRIDE_H
                            and (row - p * STRIDE_H) % DILATION_H == 0
                            and (row - p * STRIDE_H) // DILATION_H < K
                        ):
                            tap = taps[(row - p * STRIDE_H) // DILATION_H]
                            updated = updated + (acc[p] + x * tap,)
                        else:
                            updated = updated + (acc[p],)
                    acc = updated

            q_mask = (q_start + q_offs < Q)[:, None] & c_mask[None, :]
            columns_offs = (q_start + q_offs).to(tl.int64) * out_stride_w * VEC
            out_columns = out_image + columns_offs[:, None]
            for p in tl.static_range(BLOCK_P):
                y = activate(acc[p] * scale[None, :] + shift[None, :], ACT)
                mask = q_mask & (p_start + p < p_end)
                out_ptrs = out_columns + (p_start + p) * out_step_h
                tl.store(out_ptrs, y.to(out_ptr.dtype.element_ty), mask=mask)
                if parts_ptr is not None:
                    sums += tl.where(mask, y, 0.0)

    if parts_ptr is not None:
        part_ptrs = parts_ptr + (n * bands + band).to(tl.int64) * C + c_offs
        tl.store(part_ptrs, tl.sum(sums, axis=0), mask=c_mask)
