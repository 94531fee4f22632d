"""Implicit-GEMM convolution kernels with BN, residual and activation in the epilogue.

All three compute ``out = act((conv(prologue(x)) * scale + shift) * out_gate + residual)`` as one
matrix product: rows are output pixels ``m = (n, p, q)``, columns are output channels ``k``, and the
reduction runs over input channels and filter taps. They differ in how the reduction is laid out:

- ``conv_bn_act_1x1_kernel``: channels only;
- ``conv_bn_act_spatial_kernel``: blocks of channels for one tap after the other, and groups;
- ``conv_bn_act_filter_row_kernel``: one row of the filter after the other, with all channels,
  for few channels.

Letters: x[N, C, H, W], weight[K, C/groups, R, S], out and residual[N, K, P, Q], M = N*P*Q, all with
any strides. A vector or tensor that the call does not have is None. C and K, and all strides but
the channels', are given in packs of X_VEC, WEIGHT_VEC and OUT_VEC elements, so that accesses of as
many elements are known to be aligned. INT64: a tensor spans 2^31 elements or more.

Where there are few tiles, SPLIT_K programs share the reduction of one: each writes its sums to
parts[SPLIT_K, M, K], and ``conv_bn_act_finish_kernel`` adds them in a fixed order.
"""

import triton
import triton.language as tl

from cvkernels.ops.conv_bn_act.triton_parts import (
    fetch,
    finish_tile,
    first_sums,
    let_consumers_start,
    part_of,
    pixel_offsets,
    prologue,
    row_offsets,
    split_pixels,
    store_part,
    tile_ids,
    wait_for_producers,
    wide,
)

# sizes that only enter index arithmetic: specialising on them would recompile for no gain
_UNSPECIALIZED = ["M", "H", "W", "P", "Q"]
# the packs tell all that matters
_UNALIGNED = ["c_packs", "k_packs"]
_UNALIGNED += [f"{x}_stride_{axis}" for x in ("x", "out", "residual") for axis in "nhw"]
_UNALIGNED += [f"weight_stride_{axis}" for axis in "krs"]
_UNALIGNED += [f"projected_{size}" for size in ("packs", "stride_n", "stride_h", "stride_w")]
_UNALIGNED += ["projection_stride_k"]


@triton.jit(do_not_specialize=_UNSPECIALIZED, do_not_specialize_on_alignment=_UNALIGNED)
def conv_bn_act_1x1_kernel(
    x_ptr,  # [N, C, H, W]
    weight_ptr,  # [K, C]
    out_ptr,  # [N, K, P, Q]
    bias_ptr, bn_weight_ptr, bn_bias_ptr, bn_mean_ptr, bn_var_ptr, bn_eps,  # [K]
    residual_ptr,  # [N, K, P, Q]
    in_weight_ptr, in_bias_ptr, in_mean_ptr, in_var_ptr, in_eps,  # [C]
    gate_ptr,  # [N, C]
    out_gate_ptr,  # [N, K]
    parts_ptr,  # [SPLIT_K, M, K]
    projected_ptr,  # [N, C', H', W']
    projection_ptr,  # [K, C']
    M, c_packs, k_packs, P, Q,
    x_stride_n, x_stride_c, x_stride_h, x_stride_w,
    weight_stride_k, weight_stride_c,
    out_stride_n, out_stride_k, out_stride_h, out_stride_w,
    residual_stride_n, residual_stride_k, residual_stride_h, residual_stride_w,
    gate_stride_n, gate_stride_c,
    out_gate_stride_n, out_gate_stride_k,
    projected_packs, projected_stride_n, projected_stride_c, projected_stride_h, projected_stride_w,
    projection_stride_k, projection_stride_c,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PROJECTED: tl.constexpr,  # a 1x1 convolution of another map is added to the sums
    PROJECTED_STRIDE_H: tl.constexpr, PROJECTED_STRIDE_W: tl.constexpr,
    PROJECTED_EVEN_C: tl.constexpr,
    PROJECTED_VEC: tl.constexpr, PROJECTION_VEC: tl.constexpr,
    ACT: tl.constexpr, PRECISION: tl.constexpr,
    INPUT_BN: tl.constexpr,
    PER_IMAGE: tl.constexpr,  # a row tile lies within one image; what there is a gate with
    EARLY_RESIDUAL: tl.constexpr,  # fetched before the loop
    EVEN_C: tl.constexpr,  # BLOCK_K divides C
    FLAT_X: tl.constexpr,
    FLAT_OUT: tl.constexpr,
    X_VEC: tl.constexpr, WEIGHT_VEC: tl.constexpr, OUT_VEC: tl.constexpr,
    INT64: tl.constexpr, PACKED: tl.constexpr, PDL: tl.constexpr, SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """1x1 convolution without padding or groups: a matrix product over pixels.

    One program makes a tile [BLOCK_M pixels, BLOCK_N channels] of out. It reads BLOCK_M rows of x
    and BLOCK_N rows of weight, C long, and the tile of residual. x comes from memory once, and for
    the other cdiv(K, BLOCK_N) - 1 column tiles from L2.
    """
    wait_for_producers(PDL)
    C, K = c_packs * X_VEC, k_packs * OUT_VEC
    if PER_IMAGE:
        image_tiles = tl.cdiv(P * Q, BLOCK_M)
        pid_m, pid_n = tile_ids(K, BLOCK_N)
        image = pid_m // image_tiles
        m_first = image * (P * Q) + (pid_m - image * image_tiles) * BLOCK_M
        m_end = (image + 1) * (P * Q)
    else:
        pid_m, pid_n = tile_ids(K, BLOCK_N)
        image = pid_m * 0
        m_first = pid_m * BLOCK_M
        m_end = M
    m_offs = m_first + tl.arange(0, BLOCK_M)
    k_offs = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.program_id(1)
    c_begin, c_end = part_of(C, part, BLOCK_K, SPLIT_K)
    # rows and columns past the end read the last one and are not stored: no mask in the loop
    m_safe = tl.minimum(m_offs, m_end - 1)
    k_safe = tl.minimum(k_offs, K - 1)
    x_strides = (x_stride_n, x_stride_h * STRIDE_H, x_stride_w * STRIDE_W)
    x_rows = pixel_offsets(m_safe, P, Q, x_strides, FLAT_X, X_VEC, INT64)
    weight_rows = wide(k_safe, INT64) * weight_stride_k * WEIGHT_VEC
    c_offs = wide(tl.arange(0, BLOCK_K), INT64)
    x_offs = x_rows[:, None] + (c_offs * x_stride_c)[None, :]
    weight_offs = weight_rows[None, :] + (c_offs * weight_stride_c)[:, None]

    in_bn = (None, in_weight_ptr, in_bias_ptr, in_mean_ptr, in_var_ptr)
    gate = (gate_ptr, gate_stride_n, gate_stride_c)
    bn = (bias_ptr, bn_weight_ptr, bn_bias_ptr, bn_mean_ptr, bn_var_ptr)
    out_gate = (out_gate_ptr, out_gate_stride_n, out_gate_stride_k)
    residual = (
        residual_ptr, residual_stride_n, residual_stride_k, residual_stride_h, residual_stride_w,
    )  # fmt: skip
    out = (out_ptr, out_stride_n, out_stride_k, out_stride_h, out_stride_w)
    sizes = (m_end, K, P, Q)
    fetched = None
    if EARLY_RESIDUAL:
        fetched = fetch(residual, m_offs, k_offs, sizes, FLAT_OUT, OUT_VEC, INT64)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if SPLIT_K == 1:
        acc = first_sums(bn, k_offs, K, BLOCK_M)
    for c_start in range(c_begin, c_end, BLOCK_K):
        c = c_start + tl.arange(0, BLOCK_K)
        c_mask = c < C
        x_ptrs = x_ptr + wide(c_start, INT64) * x_stride_c + x_offs
        weight_ptrs = weight_ptr + wide(c_start, INT64) * weight_stride_c + weight_offs
        if EVEN_C:
            x = tl.load(x_ptrs)  # [BLOCK_M, BLOCK_K]
            weight = tl.load(weight_ptrs)  # [BLOCK_K, BLOCK_N]
        else:
            x = tl.load(x_ptrs, mask=c_mask[None, :], other=0.0)
            weight = tl.load(weight_ptrs, mask=c_mask[:, None], other=0.0)
        x = prologue(
            x, c_mask[None, :], in_bn, in_eps, gate, image, c, C, INPUT_BN, False, EVEN_C, PACKED
        )  # fmt: skip
        acc = tl.dot(x, weight, acc, input_precision=PRECISION)

    if PROJECTED:
        step_h, step_w = PROJECTED_STRIDE_H, PROJECTED_STRIDE_W
        strides = (projected_stride_n, projected_stride_h * step_h, projected_stride_w * step_w)
        other_rows = pixel_offsets(m_safe, P, Q, strides, False, PROJECTED_VEC, INT64)
        other_offs = other_rows[:, None] + (c_offs * projected_stride_c)[None, :]
        filter_rows = wide(k_safe, INT64) * projection_stride_k * PROJECTION_VEC
        filter_offs = filter_rows[None, :] + (c_offs * projection_stride_c)[:, None]
        channels = projected_packs * PROJECTED_VEC
        c_begin, c_end = part_of(channels, part, BLOCK_K, SPLIT_K)
        for c_start in range(c_begin, c_end, BLOCK_K):
            c_mask = c_start + tl.arange(0, BLOCK_K) < channels
            x_ptrs = projected_ptr + wide(c_start, INT64) * projected_stride_c + other_offs
            weight_ptrs = projection_ptr + wide(c_start, INT64) * projection_stride_c + filter_offs
            if PROJECTED_EVEN_C:
                x = tl.load(x_ptrs)
                weight = tl.load(weight_ptrs)
            else:
                x = tl.load(x_ptrs, mask=c_mask[None, :], other=0.0)
                weight = tl.load(weight_ptrs, mask=c_mask[:, None], other=0.0)
            acc = tl.dot(x, weight, acc, input_precision=PRECISION)

    let_consumers_start(PDL)
    if SPLIT_K > 1:
        store_part(acc, part, m_offs, k_offs, m_end, K, parts_ptr, M)
    else:
        finish_tile(
            acc, fetched, m_offs, pid_n * BLOCK_N, sizes, bn, bn_eps, out_gate, residual, out,
            ACT, FLAT_OUT, OUT_VEC, INT64,
        )  # fmt: skip


@triton.jit(do_not_specialize=_UNSPECIALIZED, do_not_specialize_on_alignment=_UNALIGNED)
def conv_bn_act_spatial_kernel(
    x_ptr,  # [N, C, H, W]
    weight_ptr,  # [K, C_GROUP, R, S]
    out_ptr,  # [N, K, P, Q]
    bias_ptr, bn_weight_ptr, bn_bias_ptr, bn_mean_ptr, bn_var_ptr, bn_eps,  # [K]
    residual_ptr,  # [N, K, P, Q]
    in_weight_ptr, in_bias_ptr, in_mean_ptr, in_var_ptr, in_eps,  # [C]
    gate_ptr,  # [N, C]
    out_gate_ptr,  # [N, K]
    parts_ptr,  # [SPLIT_K, M, K]
    M, c_packs, k_packs, H, W, P, Q,
    x_stride_n, x_stride_c, x_stride_h, x_stride_w,
    weight_stride_k, weight_stride_c, weight_stride_r, weight_stride_s,
    out_stride_n, out_stride_k, out_stride_h, out_stride_w,
    residual_stride_n, residual_stride_k, residual_stride_h, residual_stride_w,
    gate_stride_n, gate_stride_c,
    out_gate_stride_n, out_gate_stride_k,
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
    X_VEC: tl.constexpr, WEIGHT_VEC: tl.constexpr, OUT_VEC: tl.constexpr,
    INT64: tl.constexpr, PACKED: tl.constexpr, PDL: tl.constexpr, SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Convolution as a sum over taps (r, s) of matrix products over channels.

    One program makes a tile [BLOCK_M pixels, BLOCK_N channels] of out. Per tap it reads its
    pixels' input rows, zero outside the image, and one [BLOCK_N, C_GROUP] slice of weight; the R*S
    reads of an input row come from memory once and then from L2.

    With groups, a tile covers all groups of its BLOCK_N channels: it reads the channels of all of
    them, and weight is zero where channel and output channel are of different groups. An infinite
    or NaN input therefore reaches the other groups of its tile too.
    """
    wait_for_producers(PDL)
    C, K = c_packs * X_VEC, k_packs * OUT_VEC
    pid_m, pid_n = tile_ids(K, BLOCK_N)
    m_offs = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    k_offs = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    # rows and columns past the end read the last one and are not stored: no mask in the loop
    m_safe = tl.minimum(m_offs, M - 1)
    k_safe = tl.minimum(k_offs, K - 1)
    image, p, q = split_pixels(m_safe, P, Q)
    h_base = p * STRIDE_H - PADDING_H  # [BLOCK_M], h of tap 0
    w_base = q * STRIDE_W - PADDING_W
    x_strides = (x_stride_n, x_stride_h, x_stride_w)
    x_rows = row_offsets(image, h_base, w_base, x_strides, X_VEC, INT64)
    weight_rows = wide(k_safe, INT64) * weight_stride_k * WEIGHT_VEC
    if K_GROUP > 0:
        c_base = (pid_n * BLOCK_N) // K_GROUP * C_GROUP
        # first input channel of each output channel's group, relative to c_base
        c_first = k_safe // K_GROUP * C_GROUP - c_base  # [BLOCK_N]
    else:
        c_base = 0
        c_first = tl.zeros((BLOCK_N,), tl.int32)
    c_in_block = wide(tl.arange(0, BLOCK_K), INT64)
    x_offs = x_rows[:, None] + (c_in_block * x_stride_c)[None, :]
    weight_offs = c_in_block[:, None] - wide(c_first, INT64)[None, :]
    weight_offs = weight_rows[None, :] + weight_offs * weight_stride_c

    in_bn = (None, in_weight_ptr, in_bias_ptr, in_mean_ptr, in_var_ptr)
    gate = (gate_ptr, gate_stride_n, gate_stride_c)
    bn = (bias_ptr, bn_weight_ptr, bn_bias_ptr, bn_mean_ptr, bn_var_ptr)
    out_gate = (out_gate_ptr, out_gate_stride_n, out_gate_stride_k)
    part = tl.program_id(1)
    steps: tl.constexpr = R * S * C_STEPS
    part_steps: tl.constexpr = (steps + SPLIT_K - 1) // SPLIT_K
    step_end = steps
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if SPLIT_K > 1:
        step_end = tl.minimum((part + 1) * part_steps, steps)
    else:
        acc = first_sums(bn, k_offs, K, BLOCK_M)
    for step in range(part * part_steps, step_end):
        tap = step // C_STEPS
        r = tap // S
        s = tap - r * S
        c_start = (step - tap * C_STEPS) * BLOCK_K
        c_offs = c_start + tl.arange(0, BLOCK_K)
        # one unsigned comparison checks both ends
        h = (h_base + r * DILATION_H).to(tl.uint32, bitcast=True)
        w = (w_base + s * DILATION_W).to(tl.uint32, bitcast=True)
        inside = (h < H) & (w < W)  # [BLOCK_M]
        x_tap = wide(r * DILATION_H, INT64) * x_stride_h + wide(s * DILATION_W, INT64) * x_stride_w
        x_tap = x_tap * X_VEC + wide(c_base + c_start, INT64) * x_stride_c
        x_ptrs = x_ptr + x_tap + x_offs
        weight_tap = wide(r, INT64) * weight_stride_r + wide(s, INT64) * weight_stride_s
        weight_tap = weight_tap * WEIGHT_VEC + wide(c_start, INT64) * weight_stride_c
        weight_ptrs = weight_ptr + weight_tap + weight_offs
        c_mask = c_base + c_offs < C
        if EVEN_C:
            x_mask = inside[:, None]
        else:
            x_mask = inside[:, None] & c_mask[None, :]
        x = tl.load(x_ptrs, mask=x_mask, other=0.0)  # [BLOCK_M, BLOCK_K]
        if K_GROUP > 0:
            c_in_group = c_offs[:, None] - c_first[None, :]  # [BLOCK_K, BLOCK_N]
            weight_mask = (c_in_group >= 0) & (c_in_group < C_GROUP)
            weight = tl.load(weight_ptrs, mask=weight_mask, other=0.0)
        elif EVEN_C:
            weight = tl.load(weight_ptrs)  # [BLOCK_K, BLOCK_N]
        else:
            weight = tl.load(weight_ptrs, mask=c_mask[:, None], other=0.0)
        # padding is zero after the prologue, not before
        x = prologue(
            x, x_mask, in_bn, in_eps, gate, image, c_base + c_offs, C,
            INPUT_BN, True, EVEN_C, PACKED,
        )  # fmt: skip
        acc = tl.dot(x, weight, acc, input_precision=PRECISION)

    let_consumers_start(PDL)
    if SPLIT_K > 1:
        store_part(acc, part, m_offs, k_offs, M, K, parts_ptr, M)
    else:
        residual = (
            residual_ptr,
            residual_stride_n, residual_stride_k, residual_stride_h, residual_stride_w,
        )  # fmt: skip
        out = (out_ptr, out_stride_n, out_stride_k, out_stride_h, out_stride_w)
        sizes = (M, K, P, Q)
        finish_tile(
            acc, None, m_offs, pid_n * BLOCK_N, sizes, bn, bn_eps, out_gate, residual, out,
            ACT, FLAT_OUT, OUT_VEC, INT64,
        )  # fmt: skip


@triton.jit(do_not_specialize=_UNSPECIALIZED, do_not_specialize_on_alignment=_UNALIGNED)
def conv_bn_act_filter_row_kernel(
    x_ptr,  # [N, C, H, W]
    weight_ptr,  # [K, C, R, S]
    out_ptr,  # [N, K, P, Q]
    bias_ptr, bn_weight_ptr, bn_bias_ptr, bn_mean_ptr, bn_var_ptr, bn_eps,  # [K]
    residual_ptr,  # [N, K, P, Q]
    in_weight_ptr, in_bias_ptr, in_mean_ptr, in_var_ptr, in_eps,  # [C]
    gate_ptr,  # [N, C]
    out_gate_ptr,  # [N, K]
    M, k_packs, H, W, P, Q,
    x_stride_n, x_stride_c, x_stride_h, x_stride_w,
    weight_stride_k, weight_stride_c, weight_stride_r, weight_stride_s,
    out_stride_n, out_stride_k, out_stride_h, out_stride_w,
    residual_stride_n, residual_stride_k, residual_stride_h, residual_stride_w,
    gate_stride_n, gate_stride_c,
    out_gate_stride_n, out_gate_stride_k,
    C: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr, PADDING_W: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    CHANNELS_INNER: tl.constexpr,  # a filter row is (s, c), as NHWC lies in memory; else (c, s)
    ACT: tl.constexpr, PRECISION: tl.constexpr,
    INPUT_BN: tl.constexpr,
    FLAT_OUT: tl.constexpr,
    X_VEC: tl.constexpr, WEIGHT_VEC: tl.constexpr, OUT_VEC: tl.constexpr,
    INT64: tl.constexpr, PACKED: tl.constexpr, PDL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,  # at least S * C
):  # fmt: skip
    """Convolution of few channels (the stem): a sum over filter rows of products over (s, c).

    One program makes a tile [BLOCK_M pixels, BLOCK_N channels] of out. Per filter row it gathers
    S*C single elements per pixel, from NCHW as well as from NHWC, neighbours along the reduction
    axis being neighbours in memory. An input element is read about R*S / (STRIDE_H*STRIDE_W) times,
    from memory once and else from L1.
    """
    wait_for_producers(PDL)
    K = k_packs * OUT_VEC
    pid_m, pid_n = tile_ids(K, BLOCK_N)
    m_offs = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    k_offs = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    # rows and columns past the end read the last one and are not stored
    m_safe = tl.minimum(m_offs, M - 1)
    k_safe = tl.minimum(k_offs, K - 1)
    image, p, q = split_pixels(m_safe, P, Q)
    h_base = p * STRIDE_H - PADDING_H  # [BLOCK_M], h of tap 0
    w_base = q * STRIDE_W - PADDING_W
    x_strides = (x_stride_n, x_stride_h, x_stride_w)
    x_rows = row_offsets(image, h_base, w_base, x_strides, X_VEC, INT64)
    weight_rows = wide(k_safe, INT64) * weight_stride_k * WEIGHT_VEC

    offs = tl.arange(0, BLOCK_K)
    if CHANNELS_INNER:
        s = offs // C
        c = offs - s * C
    else:
        c = offs // S
        s = offs - c * S
    in_row = offs < S * C
    # without padding every window is inside
    MASKED: tl.constexpr = PADDING_H > 0 or PADDING_W > 0 or BLOCK_K != S * C
    # one unsigned comparison checks both ends
    w = (w_base[:, None] + (s * DILATION_W)[None, :]).to(tl.uint32, bitcast=True)
    w_mask = (w < W) & in_row[None, :]  # [BLOCK_M, BLOCK_K]
    x_cols = wide(c, INT64) * x_stride_c + wide(s * DILATION_W, INT64) * x_stride_w * X_VEC
    x_offs = x_rows[:, None] + x_cols[None, :]
    weight_cols = wide(c, INT64) * weight_stride_c + wide(s, INT64) * weight_stride_s * WEIGHT_VEC
    weight_offs = weight_rows[:, None] + weight_cols[None, :]
    x_step = wide(DILATION_H * X_VEC, INT64) * x_stride_h
    weight_step = wide(WEIGHT_VEC, INT64) * weight_stride_r

    in_bn = (None, in_weight_ptr, in_bias_ptr, in_mean_ptr, in_var_ptr)
    gate = (gate_ptr, gate_stride_n, gate_stride_c)
    bn = (bias_ptr, bn_weight_ptr, bn_bias_ptr, bn_mean_ptr, bn_var_ptr)
    out_gate = (out_gate_ptr, out_gate_stride_n, out_gate_stride_k)
    acc = first_sums(bn, k_offs, K, BLOCK_M)
    for r in range(0, R):
        h = (h_base + r * DILATION_H).to(tl.uint32, bitcast=True)
        inside = (h < H)[:, None] & w_mask
        x_ptrs = x_ptr + r * x_step + x_offs
        weight_ptrs = weight_ptr + r * weight_step + weight_offs
        if MASKED:
            x = tl.load(x_ptrs, mask=inside, other=0.0)  # [BLOCK_M, BLOCK_K]
            weight = tl.load(weight_ptrs, mask=in_row[None, :], other=0.0)  # [BLOCK_N, BLOCK_K]
        else:
            x = tl.load(x_ptrs)
            weight = tl.load(weight_ptrs)
        # padding is zero after the prologue, not before
        x = prologue(
            x, inside, in_bn, in_eps, gate, image, c, C, INPUT_BN, MASKED, not MASKED, PACKED
        )  # fmt: skip
        acc = tl.dot(x, weight.trans(), acc, input_precision=PRECISION)

    let_consumers_start(PDL)
    residual = (
        residual_ptr, residual_stride_n, residual_stride_k, residual_stride_h, residual_stride_w,
    )  # fmt: skip
    out = (out_ptr, out_stride_n, out_stride_k, out_stride_h, out_stride_w)
    sizes = (M, K, P, Q)
    finish_tile(
        acc, None, m_offs, pid_n * BLOCK_N, sizes, bn, bn_eps, out_gate, residual, out,
        ACT, FLAT_OUT, OUT_VEC, INT64,
    )  # fmt: skip


@triton.jit(do_not_specialize=_UNSPECIALIZED, do_not_specialize_on_alignment=_UNALIGNED)
def conv_bn_act_finish_kernel(
    parts_ptr,  # [SPLIT_K, M, K]
    out_ptr,  # [N, K, P, Q]
    bias_ptr, bn_weight_ptr, bn_bias_ptr, bn_mean_ptr, bn_var_ptr, bn_eps,  # [K]
    residual_ptr,  # [N, K, P, Q]
    out_gate_ptr,  # [N, K]
    M, k_packs, P, Q,
    out_stride_n, out_stride_k, out_stride_h, out_stride_w,
    residual_stride_n, residual_stride_k, residual_stride_h, residual_stride_w,
    out_gate_stride_n, out_gate_stride_k,
    ACT: tl.constexpr, FLAT_OUT: tl.constexpr, OUT_VEC: tl.constexpr, INT64: tl.constexpr,
    PDL: tl.constexpr, SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out = act(bn(sum of the parts) * out_gate + residual), of a tile of BLOCK_M x BLOCK_N."""
    wait_for_producers(PDL)
    K = k_packs * OUT_VEC
    pid_m, pid_n = tile_ids(K, BLOCK_N)
    m_offs = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    k_offs = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (m_offs < M)[:, None] & (k_offs < K)[None, :]
    bn = (bias_ptr, bn_weight_ptr, bn_bias_ptr, bn_mean_ptr, bn_var_ptr)
    out_gate = (out_gate_ptr, out_gate_stride_n, out_gate_stride_k)
    acc = first_sums(bn, k_offs, K, BLOCK_M)
    rows = m_offs.to(tl.int64) * K
    ptrs = parts_ptr + rows[:, None] + k_offs[None, :]
    for _ in tl.static_range(SPLIT_K):
        acc += tl.load(ptrs, mask=mask, other=0.0)
        ptrs += M.to(tl.int64) * K
    let_consumers_start(PDL)
    residual = (
        residual_ptr, residual_stride_n, residual_stride_k, residual_stride_h, residual_stride_w,
    )  # fmt: skip
    out = (out_ptr, out_stride_n, out_stride_k, out_stride_h, out_stride_w)
    sizes = (M, K, P, Q)
    finish_tile(
        acc, None, m_offs, pid_n * BLOCK_N, sizes, bn, bn_eps, out_gate, residual, out,
        ACT, FLAT_OUT, OUT_VEC, INT64,
    )  # fmt: skip
