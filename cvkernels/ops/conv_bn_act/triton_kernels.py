"""Implicit-GEMM convolution kernels with BN, residual and activation in the epilogue.

All three compute ``out = act(conv(prologue(x)) * scale + shift + residual)`` as one matrix product:
rows are output pixels ``m = (n, p, q)``, columns are output channels ``k``, and the reduction runs
over input channels and filter taps. They differ in how the reduction is laid out:

- ``conv_bn_act_1x1_kernel``: channels only;
- ``conv_bn_act_spatial_kernel``: blocks of channels for one tap after the other, and groups;
- ``conv_bn_act_filter_row_kernel``: one row of the filter after the other, with all channels,
  for few channels.

Letters: x[N, C, H, W], weight[K, C/groups, R, S], out and residual[N, K, P, Q], M = N*P*Q, all with
any strides. A vector or tensor that the call does not have is None. Row addresses are int64 and so
are strided sums, so that tensors of more than 2^31 elements are right.
"""

import triton
import triton.language as tl

from cvkernels.ops.conv_bn_act.triton_parts import (
    finish_tile,
    first_sums,
    pixel_offsets,
    prologue,
    row_offsets,
    split_pixels,
    tile_ids,
)

# sizes that only enter index arithmetic: specialising on them would recompile for no gain
_UNSPECIALIZED = ["M", "H", "W", "P", "Q"]


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def conv_bn_act_1x1_kernel(
    x_ptr,  # [N, C, H, W]
    weight_ptr,  # [K, C]
    out_ptr,  # [N, K, P, Q]
    bias_ptr, bn_weight_ptr, bn_bias_ptr, bn_mean_ptr, bn_var_ptr, bn_eps,  # [K]
    residual_ptr,  # [N, K, P, Q]
    in_weight_ptr, in_bias_ptr, in_mean_ptr, in_var_ptr, in_eps,  # [C]
    gate_ptr,  # [N, C]
    M, C, K, P, Q,
    x_stride_n, x_stride_c, x_stride_h, x_stride_w,
    weight_stride_k, weight_stride_c,
    out_stride_n, out_stride_k, out_stride_h, out_stride_w,
    residual_stride_n, residual_stride_k, residual_stride_h, residual_stride_w,
    gate_stride_n, gate_stride_c,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    ACT: tl.constexpr, PRECISION: tl.constexpr,
    INPUT_BN: tl.constexpr,
    GATE_UNIFORM: tl.constexpr,  # every row tile lies within one image
    EVEN_C: tl.constexpr,  # BLOCK_K divides C
    FLAT_X: tl.constexpr,
    FLAT_OUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """1x1 convolution without padding or groups: a matrix product over pixels.

    One program makes a tile [BLOCK_M pixels, BLOCK_N channels] of out. It reads BLOCK_M rows of x
    and BLOCK_N rows of weight, C long, and the tile of residual. x comes from memory once, and for
    the other cdiv(K, BLOCK_N) - 1 column tiles from L2.
    """
    pid_m, pid_n = tile_ids(M, K, BLOCK_M, BLOCK_N, GROUP_M)
    m_offs = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    k_offs = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    c_offs = tl.arange(0, BLOCK_K)
    # rows and columns past the end read the last one and are not stored: no mask in the loop
    m_safe = tl.minimum(m_offs, M - 1)
    k_safe = tl.minimum(k_offs, K - 1)
    x_strides = (x_stride_n, x_stride_h * STRIDE_H, x_stride_w * STRIDE_W)
    x_rows = pixel_offsets(m_safe, P, Q, x_strides, FLAT_X)
    weight_rows = k_safe.to(tl.int64) * weight_stride_k
    c_step = tl.full((), BLOCK_K, tl.int64)
    x_ptrs = x_ptr + x_rows[:, None] + (c_offs.to(tl.int64) * x_stride_c)[None, :]
    weight_ptrs = (
        weight_ptr + weight_rows[None, :] + (c_offs.to(tl.int64) * weight_stride_c)[:, None]
    )
    if GATE_UNIFORM:
        image = (pid_m * BLOCK_M) // (P * Q)
    else:
        image = m_safe // (P * Q)

    in_bn = (None, in_weight_ptr, in_bias_ptr, in_mean_ptr, in_var_ptr)
    gate = (gate_ptr, gate_stride_n, gate_stride_c)
    bn = (bias_ptr, bn_weight_ptr, bn_bias_ptr, bn_mean_ptr, bn_var_ptr)
    acc = first_sums(bn, k_offs, K, BLOCK_M)
    for c_start in range(0, C, BLOCK_K):
        c_mask = c_offs < C - c_start
        if EVEN_C:
            x = tl.load(x_ptrs)  # [BLOCK_M, BLOCK_K]
            weight = tl.load(weight_ptrs)  # [BLOCK_K, BLOCK_N]
        else:
            x = tl.load(x_ptrs, mask=c_mask[None, :], other=0.0)
            weight = tl.load(weight_ptrs, mask=c_mask[:, None], other=0.0)
        # channels past C are zero after the prologue, whatever it makes of them
        c = c_start + c_offs
        x = prologue(x, c_mask[None, :], in_bn, in_eps, gate, image, c, C, INPUT_BN, GATE_UNIFORM)
        acc = tl.dot(x, weight, acc, input_precision=PRECISION)
        x_ptrs += c_step * x_stride_c
        weight_ptrs += c_step * weight_stride_c

    residual = (
        residual_ptr, residual_stride_n, residual_stride_k, residual_stride_h, residual_stride_w,
    )  # fmt: skip
    out = (out_ptr, out_stride_n, out_stride_k, out_stride_h, out_stride_w)
    sizes = (M, K, P, Q)
    finish_tile(acc, m_offs, pid_n * BLOCK_N, sizes, bn, bn_eps, residual, out, ACT, FLAT_OUT)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def conv_bn_act_spatial_kernel(
    x_ptr,  # [N, C, H, W]
    weight_ptr,  # [K, C_GROUP, R, S]
    out_ptr,  # [N, K, P, Q]
    bias_ptr, bn_weight_ptr, bn_bias_ptr, bn_mean_ptr, bn_var_ptr, bn_eps,  # [K]
    residual_ptr,  # [N, K, P, Q]
    in_weight_ptr, in_bias_ptr, in_mean_ptr, in_var_ptr, in_eps,  # [C]
    gate_ptr,  # [N, C]
    M, C, K, H, W, P, Q,
    x_stride_n, x_stride_c, x_stride_h, x_stride_w,
    weight_stride_k, weight_stride_c, weight_stride_r, weight_stride_s,
    out_stride_n, out_stride_k, out_stride_h, out_stride_w,
    residual_stride_n, residual_stride_k, residual_stride_h, residual_stride_w,
    gate_stride_n, gate_stride_c,
    R: tl.constexpr, S: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr, PADDING_W: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    C_GROUP: tl.constexpr,  # C / groups
    K_GROUP: tl.constexpr,  # K / groups; 0 if there is one group
    C_STEPS: tl.constexpr,  # blocks of BLOCK_K channels that a column tile reads per tap
    ACT: tl.constexpr, PRECISION: tl.constexpr,
    INPUT_BN: tl.constexpr,
    EVEN_C: tl.constexpr,  # one group, and BLOCK_K divides C
    FLAT_OUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """Convolution as a sum over taps (r, s) of matrix products over channels.

    One program makes a tile [BLOCK_M pixels, BLOCK_N channels] of out. Per tap it reads its
    pixels' input rows, zero outside the image, and one [BLOCK_N, C_GROUP] slice of weight; the R*S
    reads of an input row come from memory once and then from L2.

    With groups, a tile covers all groups of its BLOCK_N channels: it reads the channels of all of
    them, and weight is zero where channel and output channel are of different groups. An infinite
    or NaN input therefore reaches the other groups of its tile too.
    """
    pid_m, pid_n = tile_ids(M, K, BLOCK_M, BLOCK_N, GROUP_M)
    m_offs = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    k_offs = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    # rows and columns past the end read the last one and are not stored: no mask in the loop
    m_safe = tl.minimum(m_offs, M - 1)
    k_safe = tl.minimum(k_offs, K - 1)
    image, p, q = split_pixels(m_safe, P, Q)
    h_base = p * STRIDE_H - PADDING_H  # [BLOCK_M], h of tap 0
    w_base = q * STRIDE_W - PADDING_W
    x_rows = row_offsets(image, h_base, w_base, (x_stride_n, x_stride_h, x_stride_w))
    weight_rows = k_safe.to(tl.int64) * weight_stride_k
    if K_GROUP > 0:
        c_base = (pid_n * BLOCK_N) // K_GROUP * C_GROUP
        # first input channel of each output channel's group, relative to c_base
        c_first = k_safe // K_GROUP * C_GROUP - c_base  # [BLOCK_N]
    else:
        c_base = 0
        c_first = tl.zeros((BLOCK_N,), tl.int32)

    in_bn = (None, in_weight_ptr, in_bias_ptr, in_mean_ptr, in_var_ptr)
    gate = (gate_ptr, gate_stride_n, gate_stride_c)
    bn = (bias_ptr, bn_weight_ptr, bn_bias_ptr, bn_mean_ptr, bn_var_ptr)
    acc = first_sums(bn, k_offs, K, BLOCK_M)
    for step in range(0, R * S * C_STEPS):
        tap = step // C_STEPS
        r = tap // S
        s = tap - r * S
        c_offs = (step - tap * C_STEPS) * BLOCK_K + tl.arange(0, BLOCK_K)
        h = h_base + r * DILATION_H
        w = w_base + s * DILATION_W
        inside = (h >= 0) & (h < H) & (w >= 0) & (w < W)  # [BLOCK_M]
        x_tap = (r * DILATION_H).to(tl.int64) * x_stride_h
        x_tap += (s * DILATION_W).to(tl.int64) * x_stride_w
        x_ptrs = x_ptr + x_rows[:, None]
        x_ptrs += (x_tap + (c_base + c_offs).to(tl.int64) * x_stride_c)[None, :]
        weight_tap = r.to(tl.int64) * weight_stride_r + s.to(tl.int64) * weight_stride_s
        c_mask = c_base + c_offs < C
        if EVEN_C:
            x_mask = inside[:, None]
        else:
            x_mask = inside[:, None] & c_mask[None, :]
        x = tl.load(x_ptrs, mask=x_mask, other=0.0)  # [BLOCK_M, BLOCK_K]
        if K_GROUP > 0:
            c_in_group = c_offs[:, None] - c_first[None, :]  # [BLOCK_K, BLOCK_N]
            weight_ptrs = weight_ptr + weight_tap + weight_rows[None, :]
            weight_ptrs += c_in_group.to(tl.int64) * weight_stride_c
            weight_mask = (c_in_group >= 0) & (c_in_group < C_GROUP)
            weight = tl.load(weight_ptrs, mask=weight_mask, other=0.0)
        else:
            weight_ptrs = weight_ptr + weight_rows[None, :]
            weight_ptrs += (weight_tap + c_offs.to(tl.int64) * weight_stride_c)[:, None]
            if EVEN_C:
                weight = tl.load(weight_ptrs)  # [BLOCK_K, BLOCK_N]
            else:
                weight = tl.load(weight_ptrs, mask=c_mask[:, None], other=0.0)
        # padding is zero after the prologue, not before
        x = prologue(x, x_mask, in_bn, in_eps, gate, image, c_base + c_offs, C, INPUT_BN, False)
        acc = tl.dot(x, weight, acc, input_precision=PRECISION)

    residual = (
        residual_ptr, residual_stride_n, residual_stride_k, residual_stride_h, residual_stride_w,
    )  # fmt: skip
    out = (out_ptr, out_stride_n, out_stride_k, out_stride_h, out_stride_w)
    sizes = (M, K, P, Q)
    finish_tile(acc, m_offs, pid_n * BLOCK_N, sizes, bn, bn_eps, residual, out, ACT, FLAT_OUT)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def conv_bn_act_filter_row_kernel(
    x_ptr,  # [N, C, H, W]
    weight_ptr,  # [K, C, R, S]
    out_ptr,  # [N, K, P, Q]
    bias_ptr, bn_weight_ptr, bn_bias_ptr, bn_mean_ptr, bn_var_ptr, bn_eps,  # [K]
    residual_ptr,  # [N, K, P, Q]
    in_weight_ptr, in_bias_ptr, in_mean_ptr, in_var_ptr, in_eps,  # [C]
    gate_ptr,  # [N, C]
    M, K, H, W, P, Q,
    x_stride_n, x_stride_c, x_stride_h, x_stride_w,
    weight_stride_k, weight_stride_c, weight_stride_r, weight_stride_s,
    out_stride_n, out_stride_k, out_stride_h, out_stride_w,
    residual_stride_n, residual_stride_k, residual_stride_h, residual_stride_w,
    gate_stride_n, gate_stride_c,
    C: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr, PADDING_W: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    CHANNELS_INNER: tl.constexpr,  # a filter row is (s, c), as NHWC lies in memory; else (c, s)
    ACT: tl.constexpr, PRECISION: tl.constexpr,
    INPUT_BN: tl.constexpr,
    FLAT_OUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,  # at least S * C
    GROUP_M: tl.constexpr,
):  # fmt: skip
    """Convolution of few channels (the stem): a sum over filter rows of products over (s, c).

    One program makes a tile [BLOCK_M pixels, BLOCK_N channels] of out. Per filter row it gathers
    S*C single elements per pixel, from NCHW as well as from NHWC, neighbours along the reduction
    axis being neighbours in memory. An input element is read about R*S / (STRIDE_H*STRIDE_W) times,
    from memory once and else from L1.
    """
    pid_m, pid_n = tile_ids(M, K, BLOCK_M, BLOCK_N, GROUP_M)
    m_offs = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    k_offs = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    # rows and columns past the end read the last one and are not stored
    m_safe = tl.minimum(m_offs, M - 1)
    k_safe = tl.minimum(k_offs, K - 1)
    image, p, q = split_pixels(m_safe, P, Q)
    h_base = p * STRIDE_H - PADDING_H  # [BLOCK_M], h of tap 0
    w_base = q * STRIDE_W - PADDING_W
    x_rows = row_offsets(image, h_base, w_base, (x_stride_n, x_stride_h, x_stride_w))
    weight_rows = k_safe.to(tl.int64) * weight_stride_k

    offs = tl.arange(0, BLOCK_K)
    if CHANNELS_INNER:
        s = offs // C
        c = offs - s * C
    else:
        c = offs // S
        s = offs - c * S
    in_row = offs < S * C
    # one unsigned comparison checks both ends
    w = (w_base[:, None] + (s * DILATION_W)[None, :]).to(tl.uint32, bitcast=True)
    w_mask = (w < W) & in_row[None, :]  # [BLOCK_M, BLOCK_K]
    x_cols = c.to(tl.int64) * x_stride_c + (s * DILATION_W).to(tl.int64) * x_stride_w
    x_ptrs = x_ptr + x_rows[:, None] + x_cols[None, :]
    x_step = tl.full((), DILATION_H, tl.int64) * x_stride_h
    weight_cols = c.to(tl.int64) * weight_stride_c + s.to(tl.int64) * weight_stride_s
    weight_ptrs = weight_ptr + weight_rows[:, None] + weight_cols[None, :]

    in_bn = (None, in_weight_ptr, in_bias_ptr, in_mean_ptr, in_var_ptr)
    gate = (gate_ptr, gate_stride_n, gate_stride_c)
    bn = (bias_ptr, bn_weight_ptr, bn_bias_ptr, bn_mean_ptr, bn_var_ptr)
    acc = first_sums(bn, k_offs, K, BLOCK_M)
    for r in range(0, R):
        h = (h_base + r * DILATION_H).to(tl.uint32, bitcast=True)
        inside = (h < H)[:, None] & w_mask
        x = tl.load(x_ptrs, mask=inside, other=0.0)  # [BLOCK_M, BLOCK_K]
        weight = tl.load(weight_ptrs, mask=in_row[None, :], other=0.0)  # [BLOCK_N, BLOCK_K]
        # padding is zero after the prologue, not before
        x = prologue(x, inside, in_bn, in_eps, gate, image, c, C, INPUT_BN, False)
        acc = tl.dot(x, weight.trans(), acc, input_precision=PRECISION)
        x_ptrs += x_step
        weight_ptrs += weight_stride_r

    residual = (
        residual_ptr, residual_stride_n, residual_stride_k, residual_stride_h, residual_stride_w,
    )  # fmt: skip
    out = (out_ptr, out_stride_n, out_stride_k, out_stride_h, out_stride_w)
    sizes = (M, K, P, Q)
    finish_tile(acc, m_offs, pid_n * BLOCK_N, sizes, bn, bn_eps, residual, out, ACT, FLAT_OUT)
