"""The pieces that the kernels of this op share: addressing, prologue and epilogue of one tile.

Strides but those of channels are in packs of VEC elements, so that accesses of VEC elements are
known to be aligned. Offsets are int64 with INT64, else int32, which takes fewer instructions.
"""

import triton
import triton.language as tl


@triton.jit
def tile_ids(K, BLOCK_N: tl.constexpr):
    """(pid_m, pid_n) of this program: the column tiles of a row tile follow one another.

    The programs that run at one time then share its rows of x in L2, where the weights stay.
    """
    pid = tl.program_id(0)
    tiles_n = tl.cdiv(K, BLOCK_N)
    pid_m = (pid.to(tl.uint32) // tiles_n.to(tl.uint32)).to(tl.int32)
    return pid_m, pid - pid_m * tiles_n


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
def wide(index, INT64: tl.constexpr):
    """An index or size in the type of offsets."""
    if INT64:
        index = index + tl.zeros((), tl.int64)  # the interpreter's may be plain ints
    return index


@triton.jit
def row_offsets(n, h, w, strides, VEC: tl.constexpr, INT64: tl.constexpr):
    """Offsets of the pixels (n, h, w)."""
    stride_n, stride_h, stride_w = strides
    packs = wide(n, INT64) * stride_n + wide(h, INT64) * stride_h + wide(w, INT64) * stride_w
    return packs * VEC


@triton.jit
def pixel_offsets(
    m_offs, P, Q, strides, FLAT: tl.constexpr, VEC: tl.constexpr, INT64: tl.constexpr
):
    """Offsets of the pixels m = (n, p, q); FLAT: they all lie at one common stride."""
    if FLAT:
        offs = wide(m_offs, INT64) * strides[2] * VEC
    else:
        n, p, q = split_pixels(m_offs, P, Q)
        offs = row_offsets(n, p, q, strides, VEC, INT64)
    return offs


@triton.jit
def load_vector(ptr, offs, mask, other):
    """Elements of a vector in float32; mask is None where all of them exist."""
    if mask is None:
        vector = tl.load(ptr + offs)
    else:
        vector = tl.load(ptr + offs, mask=mask, other=other)
    return vector.to(tl.float32)


@triton.jit
def affine(bn, eps, offs, mask):
    """(scale, shift) of batch_norm(y + bias) = y * scale + shift, float32; bn may hold None."""
    bias_ptr, bn_weight_ptr, bn_bias_ptr, bn_mean_ptr, bn_var_ptr = bn
    scale = tl.full(offs.shape, 1.0, tl.float32)
    shift = tl.zeros(offs.shape, tl.float32)
    if bn_var_ptr is not None:
        scale = tl.rsqrt(load_vector(bn_var_ptr, offs, mask, 1.0) + eps)
    if bn_weight_ptr is not None:
        scale *= load_vector(bn_weight_ptr, offs, mask, 0.0)
    if bias_ptr is not None:
        shift += load_vector(bias_ptr, offs, mask, 0.0)
    if bn_mean_ptr is not None:
        shift -= load_vector(bn_mean_ptr, offs, mask, 0.0)
    if bias_ptr is not None or bn_mean_ptr is not None:
        shift *= scale
        if bn_bias_ptr is not None:
            shift += load_vector(bn_bias_ptr, offs, mask, 0.0)
    elif bn_bias_ptr is not None:
        shift = load_vector(bn_bias_ptr, offs, mask, 0.0)
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
def relu(y):
    return tl.maximum(y, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def silu(y, FORM: tl.constexpr):
    """y * sigmoid(y), in one of the forms of ``cvkernels.ops.common.triton_launch.activation``."""
    if FORM == "silu_tanh":
        # h + h * tanh(h) for h = y / 2, in three instructions
        half = 0.5 * y
        tanh: tl.constexpr = "tanh.approx.f32 $0, $1;"
        t = tl.inline_asm_elementwise(tanh, "=f,f", [half], tl.float32, is_pure=True, pack=1)
        y = half * t + half
    elif FORM == "silu_exp2":
        # y / (1 + 2^(-y log2(e))), in five
        power: tl.constexpr = "ex2.approx.ftz.f32 $0, $1;"
        inverse: tl.constexpr = "rcp.approx.ftz.f32 $0, $1;"
        e = y * -1.4426950408889634
        e = tl.inline_asm_elementwise(power, "=f,f", [e], tl.float32, is_pure=True, pack=1)
        e = 1.0 + e
        e = tl.inline_asm_elementwise(inverse, "=f,f", [e], tl.float32, is_pure=True, pack=1)
        y = y * e
    else:
        y = y / (1.0 + tl.exp(-y))
    return y


@triton.jit
def activate(y, ACT: tl.constexpr):
    if ACT == "relu":
        y = relu(y)
    elif ACT == "relu6":
        y = tl.minimum(relu(y), 6.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACT != "none":
        y = silu(y, ACT)
    return y


@triton.jit
def scaled_relu(x, scale, shift, PACKED: tl.constexpr):
    """relu(x * scale + shift) in x's dtype, computed in float32.

    PACKED, for 16 bits: five instructions for two elements.
    """
    if PACKED:
        if x.dtype == tl.bfloat16:
            widen: tl.constexpr = "shl.b32 a, $1, 16; and.b32 b, $1, 0xffff0000;"
            narrow: tl.constexpr = "cvt.rn.relu.bf16x2.f32 $0, b, a; }"
        else:
            widen: tl.constexpr = (
                "{ .reg .b16 l, h; mov.b32 {l, h}, $1; cvt.f32.f16 a, l; cvt.f32.f16 b, h; }"
            )
            narrow: tl.constexpr = "cvt.rn.relu.f16x2.f32 $0, b, a; }"
        both: tl.constexpr = (
            "{ .reg .f32 a, b; " + widen
            + "fma.rn.f32 a, a, $2, $4; fma.rn.f32 b, b, $3, $5; " + narrow
        )  # fmt: skip
        x = tl.inline_asm_elementwise(
            both, "=r,r,f,f,f,f", [x, scale, shift], x.dtype, is_pure=True, pack=2
        )
    else:
        x = relu(x.to(tl.float32) * scale + shift).to(x.dtype)
    return x


@triton.jit
def prologue(
    x, mask, bn, eps, gate, image, c_offs, C,
    INPUT_BN: tl.constexpr, MASKED: tl.constexpr, EVEN_C: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """relu(bn(x)) * gate of a tile x[rows, c_offs], each part optional; channels past C are zero.

    ``image`` is each row's, or one for all of them. MASKED: with zeros where mask is not. EVEN_C:
    there are no channels past C.
    """
    gate_ptr, stride_n, stride_c = gate
    c_mask = c_offs < C
    if EVEN_C:
        c_mask = None
    if INPUT_BN and gate_ptr is None:
        scale, shift = affine(bn, eps, c_offs, c_mask)
        x = scaled_relu(x, scale[None, :], shift[None, :], PACKED)
    elif INPUT_BN or gate_ptr is not None:
        u = x.to(tl.float32)
        if INPUT_BN:
            scale, shift = affine(bn, eps, c_offs, c_mask)
            u = relu(u * scale[None, :] + shift[None, :])
        x = (u * load_gate(gate, image, c_offs, C)).to(x.dtype)
    if MASKED and (INPUT_BN or gate_ptr is not None):
        x = tl.where(mask, x, 0.0)
    return x


@triton.jit
def load_gate(gate, image, c_offs, C):
    """The multipliers of a tile's channels, for each row's image or one for all rows."""
    gate_ptr, stride_n, stride_c = gate
    row = gate_ptr + image.to(tl.int64) * stride_n
    cols = c_offs.to(tl.int64) * stride_c
    if image.type.is_block():
        ptrs = row[:, None] + cols[None, :]
        multipliers = tl.load(ptrs, mask=(c_offs < C)[None, :], other=0.0)
    else:
        multipliers = tl.load(row + cols, mask=c_offs < C, other=0.0)[None, :]
    return multipliers.to(tl.float32)


@triton.jit
def part_of(C, part, BLOCK_K: tl.constexpr, SPLIT_K: tl.constexpr):
    """The first channel of a part of a split reduction, and the end of it."""
    c_begin = part * (tl.cdiv(tl.cdiv(C, BLOCK_K), SPLIT_K) * BLOCK_K)
    c_end = C
    if SPLIT_K > 1:
        c_end = tl.minimum(c_begin + tl.cdiv(tl.cdiv(C, BLOCK_K), SPLIT_K) * BLOCK_K, C)
    return c_begin, c_end


@triton.jit
def store_part(acc, part, m_offs, k_offs, m_end, K, parts_ptr, M):
    """A tile's sums over one part of the reduction, into parts[part, M, K]."""
    rows = (part.to(tl.int64) * M + m_offs) * K
    mask = (m_offs < m_end)[:, None] & (k_offs < K)[None, :]
    tl.store(parts_ptr + rows[:, None] + k_offs[None, :], acc, mask=mask)


@triton.jit
def wait_for_producers(PDL: tl.constexpr):
    """Before the first access to memory: the launches before this one have ended.

    PDL, programmatic dependent launch: the programs start while those of the launch before end.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()


@triton.jit
def let_consumers_start(PDL: tl.constexpr):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def finish_tile(
    acc,  # [BLOCK_M, BLOCK_N], float32
    fetched,  # the tile of residual where it is there already, else None
    m_offs,  # [BLOCK_M]
    k_start, sizes, bn, bn_eps, out_gate, residual, out,
    ACT: tl.constexpr, FLAT_OUT: tl.constexpr, VEC: tl.constexpr, INT64: tl.constexpr,
):  # fmt: skip
    """out = act(bn(acc) * out_gate + residual) for the output channels from k_start on.

    Without a norm acc has the bias, see :func:`first_sums`.
    """
    BLOCK_N: tl.constexpr = acc.shape[1]
    late: tl.constexpr = residual[0] is not None and fetched is None
    if BLOCK_N > 64 and (has_norm(bn) or late or out_gate[0] is not None):
        # half by half: vectors, gates and residual of a wide tile would not fit the registers
        halves = acc.reshape(acc.shape[0], 2, BLOCK_N // 2).permute(0, 2, 1)
        left, right = halves.split()
        k_half = k_start + BLOCK_N // 2
        _finish(
            left, None, m_offs, k_start, sizes, bn, bn_eps, out_gate, residual, out,
            ACT, FLAT_OUT, VEC, INT64,
        )  # fmt: skip
        _finish(
            right, None, m_offs, k_half, sizes, bn, bn_eps, out_gate, residual, out,
            ACT, FLAT_OUT, VEC, INT64,
        )  # fmt: skip
    else:
        _finish(
            acc, fetched, m_offs, k_start, sizes, bn, bn_eps, out_gate, residual, out,
            ACT, FLAT_OUT, VEC, INT64,
        )  # fmt: skip


@triton.jit
def _finish(
    acc, fetched, m_offs, k_start, sizes, bn, bn_eps, out_gate, residual, out,
    ACT: tl.constexpr, FLAT_OUT: tl.constexpr, VEC: tl.constexpr, INT64: tl.constexpr,
):  # fmt: skip
    m_end, K, P, Q = sizes
    k_offs = k_start + tl.arange(0, acc.shape[1])
    mask = (m_offs < m_end)[:, None] & (k_offs < K)[None, :]
    y = acc
    if has_norm(bn):
        y = normalize(acc, bn, bn_eps, k_offs, K)
    if out_gate[0] is not None:
        image, _, _ = split_pixels(tl.minimum(m_offs, m_end - 1), P, Q)
        y *= load_gate(out_gate, image, k_offs, K)
    if fetched is not None:
        y += fetched.to(tl.float32)
    elif residual[0] is not None:
        y += fetch(residual, m_offs, k_offs, sizes, FLAT_OUT, VEC, INT64).to(tl.float32)
    y = activate(y, ACT)
    out_ptrs = _tile_ptrs(out, m_offs, k_offs, P, Q, FLAT_OUT, VEC, INT64)
    tl.store(out_ptrs, y.to(out[0].dtype.element_ty), mask=mask)


@triton.jit
def fetch(
    tensor, m_offs, k_offs, sizes, FLAT: tl.constexpr, VEC: tl.constexpr, INT64: tl.constexpr
):
    """A tile of a map of the output's shape."""
    m_end, K, P, Q = sizes
    mask = (m_offs < m_end)[:, None] & (k_offs < K)[None, :]
    return tl.load(_tile_ptrs(tensor, m_offs, k_offs, P, Q, FLAT, VEC, INT64), mask=mask, other=0.0)


@triton.jit
def _tile_ptrs(
    tensor, m_offs, k_offs, P, Q,
    FLAT: tl.constexpr, VEC: tl.constexpr, INT64: tl.constexpr,
):  # fmt: skip
    ptr, stride_n, stride_k, stride_h, stride_w = tensor
    rows = pixel_offsets(m_offs, P, Q, (stride_n, stride_h, stride_w), FLAT, VEC, INT64)
    return ptr + (rows[:, None] + (wide(k_offs, INT64) * stride_k)[None, :])
