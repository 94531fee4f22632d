"""The pieces that the kernels of this op share: addressing, prologue and epilogue of one tile."""

import triton
import triton.language as tl


@triton.jit
def tile_ids(M, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """(pid_m, pid_n) of this program, in bands of GROUP_M row tiles.

    The programs that run at one time then share both x and weight in L2.
    """
    pid = tl.program_id(0)
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(K, BLOCK_N)
    band = pid // (GROUP_M * tiles_n)
    in_band = pid - band * (GROUP_M * tiles_n)
    rows = min(tiles_m - band * GROUP_M, GROUP_M)
    return band * GROUP_M + in_band % rows, in_band // rows


@triton.jit
def split_pixels(m_offs, P, Q):
    """(n, p, q) of the pixels m >= 0, by unsigned division, which is the cheaper one."""
    m = m_offs.to(tl.uint32)
    row = m // Q.to(tl.uint32)
    n = row // P.to(tl.uint32)
    q = m - row * Q.to(tl.uint32)
    p = row - n * P.to(tl.uint32)
    return n.to(tl.int32), p.to(tl.int32), q.to(tl.int32)


@triton.jit
def row_offsets(n, h, w, strides):
    """int64 offsets of the pixels (n, h, w)."""
    stride_n, stride_h, stride_w = strides
    return n.to(tl.int64) * stride_n + h.to(tl.int64) * stride_h + w.to(tl.int64) * stride_w


@triton.jit
def pixel_offsets(m_offs, P, Q, strides, FLAT: tl.constexpr):
    """int64 offsets of the pixels m = (n, p, q); FLAT: they all lie at one common stride."""
    if FLAT:
        offs = m_offs.to(tl.int64) * strides[2]
    else:
        n, p, q = split_pixels(m_offs, P, Q)
        offs = row_offsets(n, p, q, strides)
    return offs


@triton.jit
def affine(bn, eps, offs, mask):
    """(scale, shift) of batch_norm(y + bias) = y * scale + shift, float32; bn may hold None."""
    bias_ptr, bn_weight_ptr, bn_bias_ptr, bn_mean_ptr, bn_var_ptr = bn
    scale = tl.full(offs.shape, 1.0, tl.float32)
    shift = tl.zeros(offs.shape, tl.float32)
    if bn_var_ptr is not None:
        var = tl.load(bn_var_ptr + offs, mask=mask, other=1.0).to(tl.float32)
        scale = tl.rsqrt(var + eps)
    if bn_weight_ptr is not None:
        scale *= tl.load(bn_weight_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        shift += tl.load(bias_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    if bn_mean_ptr is not None:
        shift -= tl.load(bn_mean_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    shift *= scale
    if bn_bias_ptr is not None:
        shift += tl.load(bn_bias_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    return scale, shift


@triton.jit
def has_norm(bn) -> tl.constexpr:
    """Whether more than a bias is applied to the sums."""
    _, bn_weight_ptr, bn_bias_ptr, bn_mean_ptr, bn_var_ptr = bn
    some: tl.constexpr = (
        bn_weight_ptr is not None
        or bn_bias_ptr is not None
        or bn_mean_ptr is not None
        or bn_var_ptr is not None
    )
    return some


@triton.jit
def first_sums(bn, k_offs, K, BLOCK_M: tl.constexpr):
    """A tile's sums before the first product: the bias, where no norm follows it."""
    acc = tl.zeros((BLOCK_M, k_offs.shape[0]), tl.float32)
    if not has_norm(bn):
        if bn[0] is not None:
            bias = tl.load(bn[0] + k_offs, mask=k_offs < K, other=0.0)
            acc += bias.to(tl.float32)[None, :]
    return acc


@triton.jit
def normalize(y, bn, eps, offs, SIZE):
    """batch_norm(y + bias) of a tile y[rows, offs], in float32."""
    # Only row 0 does work. A vector's loads and root the compiler would repeat in the layout of y,
    # for each thread and column, and keep all of them in registers; a tile's it shares.
    rows = tl.arange(0, 4)[:, None]
    cols = offs[None, :] + rows * 0
    mask = (rows == 0) & (cols < SIZE)
    scale, shift = affine(bn, eps, cols, mask)
    scale = tl.sum(tl.where(mask, scale, 0.0), axis=0)
    shift = tl.sum(tl.where(mask, shift, 0.0), axis=0)
    return y * scale[None, :] + shift[None, :]


@triton.jit
def normalize_input(x, bn, eps, c_offs, C):
    """The same inside the reduction loop, where the vectors come through its pipeline."""
    scale, shift = affine(bn, eps, c_offs, c_offs < C)
    return x * scale[None, :] + shift[None, :]


@triton.jit
def relu(y):
    return tl.maximum(y, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def activate(y, ACT: tl.constexpr):
    if ACT == "relu":
        y = relu(y)
    elif ACT == "relu6":
        y = tl.minimum(relu(y), 6.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACT == "silu":
        y = y / (1.0 + tl.exp(-y))
    else:
        tl.static_assert(ACT == "none")
    return y


@triton.jit
def prologue(
    x, mask, bn, eps, gate, image, c_offs, C, INPUT_BN: tl.constexpr, GATE_UNIFORM: tl.constexpr
):
    """relu(bn(x)) * gate of a tile x[rows, c_offs], zero where mask is not; each part optional.

    ``image`` is each row's, or with GATE_UNIFORM one for all of them.
    """
    gate_ptr, stride_n, stride_c = gate
    if INPUT_BN or gate_ptr is not None:
        u = x.to(tl.float32)
        if INPUT_BN:
            u = relu(normalize_input(u, bn, eps, c_offs, C))
        if gate_ptr is not None:
            row = gate_ptr + image.to(tl.int64) * stride_n
            cols = c_offs.to(tl.int64) * stride_c
            if GATE_UNIFORM:
                u *= tl.load(row + cols, mask=c_offs < C, other=0.0).to(tl.float32)[None, :]
            else:
                ptrs = row[:, None] + cols[None, :]
                u *= tl.load(ptrs, mask=(c_offs < C)[None, :], other=0.0).to(tl.float32)
        x = tl.where(mask, u, 0.0).to(x.dtype)
    return x


@triton.jit
def finish_tile(
    acc,  # [BLOCK_M, BLOCK_N], float32
    m_offs,  # [BLOCK_M]
    k_start, sizes, bn, bn_eps, residual, out,
    ACT: tl.constexpr, FLAT_OUT: tl.constexpr,
):  # fmt: skip
    """out = act(bn(acc) + residual) for the output channels from k_start on.

    Without a norm acc has the bias, see :func:`first_sums`.
    """
    BLOCK_N: tl.constexpr = acc.shape[1]
    if BLOCK_N > 64 and (has_norm(bn) or residual[0] is not None):
        # half by half: scale, shift and residual of a wide tile would not fit the registers
        halves = acc.reshape(acc.shape[0], 2, BLOCK_N // 2).permute(0, 2, 1)
        left, right = halves.split()
        k_half = k_start + BLOCK_N // 2
        _finish(left, m_offs, k_start, sizes, bn, bn_eps, residual, out, ACT, FLAT_OUT)
        _finish(right, m_offs, k_half, sizes, bn, bn_eps, residual, out, ACT, FLAT_OUT)
    else:
        _finish(acc, m_offs, k_start, sizes, bn, bn_eps, residual, out, ACT, FLAT_OUT)


@triton.jit
def _finish(
    acc, m_offs, k_start, sizes, bn, bn_eps, residual, out,
    ACT: tl.constexpr, FLAT_OUT: tl.constexpr,
):  # fmt: skip
    M, K, P, Q = sizes
    k_offs = k_start + tl.arange(0, acc.shape[1])
    mask = (m_offs < M)[:, None] & (k_offs < K)[None, :]
    y = acc
    if has_norm(bn):
        y = normalize(acc, bn, bn_eps, k_offs, K)
    if residual[0] is not None:
        residual_ptrs = _tile_ptrs(residual, m_offs, k_offs, P, Q, FLAT_OUT)
        y += tl.load(residual_ptrs, mask=mask, other=0.0).to(tl.float32)
    y = activate(y, ACT)
    out_ptrs = _tile_ptrs(out, m_offs, k_offs, P, Q, FLAT_OUT)
    tl.store(out_ptrs, y.to(out[0].dtype.element_ty), mask=mask)


@triton.jit
def _tile_ptrs(tensor, m_offs, k_offs, P, Q, FLAT: tl.constexpr):
    ptr, stride_n, stride_k, stride_h, stride_w = tensor
    rows = pixel_offsets(m_offs, P, Q, (stride_n, stride_h, stride_w), FLAT)
    return ptr + rows[:, None] + (k_offs.to(tl.int64) * stride_k)[None, :]
