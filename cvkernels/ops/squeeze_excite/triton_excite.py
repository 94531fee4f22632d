"""The two layers of excite on a GPU, as products over the images of a batch.

Letters: sums[N, parts, C], whose total over the parts, divided, is the mean; weight1[R, C],
weight2[K, R]; out[N, K]. A bias that the call does not have is None.

Where the layers are small one launch makes both, each of its programs with the hidden layer of its
images. Else the first layer is cut along C, so that many programs read weight1 at once, and the
second launch adds what they made. No atomics: equal inputs give equal bits.
"""

import triton
import triton.language as tl
from triton import knobs

from cvkernels.ops.squeeze_excite.triton_kernels import activate, load_tile, sigmoid, store_tile

INTERPRETED = tl.constexpr(bool(knobs.runtime.interpret))


@triton.jit
def add_product(acc, a, weight):
    """acc[M, N] + a[M, K] @ weight[N, K].T of a in float32, at close to float32's precision.

    Beside 16-bit weights a is the sum of two of their numbers, of at least 16 bits together.
    """
    if weight.dtype == tl.float32:
        acc = tl.dot(a, weight.trans(), acc, input_precision="tf32x3")
    else:
        high = a.to(weight.dtype)
        rounded = high.to(tl.float32)
        low = tl.where(tl.abs(rounded) == float("inf"), 0.0, a - rounded).to(weight.dtype)
        # The interpreter's dot is wrong for bfloat16.
        if INTERPRETED and weight.dtype == tl.bfloat16:
            high, low, weight = high.to(tl.float32), low.to(tl.float32), weight.to(tl.float32)
        acc = tl.dot(high, weight.trans(), acc)
        acc = tl.dot(low, weight.trans(), acc)
    return acc


@triton.jit
def matrix_tile(ptr, rows, columns, row_count, column_count):
    """Of a dense matrix, zeros past its ends."""
    offs = (rows.to(tl.int64) * column_count)[:, None] + columns[None, :]
    mask = (rows < row_count)[:, None] & (columns < column_count)[None, :]
    return tl.load(ptr + offs, mask=mask, other=0.0)


@triton.jit
def first_product(
    sums_ptr, weight1_ptr, n_offs, r_offs,
    N, C, R, parts, divisor, first, last,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """[BLOCK_N, BLOCK_R], over the steps first to last: the parts of BLOCK_C channels, then of the
    next ones."""
    acc = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    for step in tl.range(first, last, num_stages=STAGES):
        c_offs = step // parts * BLOCK_C + tl.arange(0, BLOCK_C)
        offs = ((n_offs * parts + step % parts) * C)[:, None] + c_offs[None, :]
        mask = (n_offs < N)[:, None] & (c_offs < C)[None, :]
        mean = load_tile(sums_ptr, offs, mask) / divisor
        weight = matrix_tile(weight1_ptr, r_offs, c_offs, R, C)
        acc = add_product(acc, mean, weight)
    return acc


@triton.jit
def store_logits(out_ptr, acc, bias2_ptr, n_offs, k_offs, N, K, SIGMOID: tl.constexpr):
    """acc + bias2, or its sigmoid."""
    y = acc + load_tile(bias2_ptr, k_offs, k_offs < K)[None, :]
    if SIGMOID:
        y = sigmoid(y)
    offs = (n_offs * K)[:, None] + k_offs[None, :]
    store_tile(out_ptr, offs, y, (n_offs < N)[:, None] & (k_offs < K)[None, :])


@triton.jit(do_not_specialize=["N"])
def excite_kernel(
    sums_ptr,  # [N, parts, C]
    weight1_ptr,  # [R, C]
    bias1_ptr,  # [R]
    weight2_ptr,  # [K, R]
    bias2_ptr,  # [K]
    out_ptr,  # [N, K]
    N, C, R, K, parts, divisor,
    ACT: tl.constexpr, SIGMOID: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_OUT: tl.constexpr,
    BLOCK_R: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Both layers, BLOCK_OUT channels of BLOCK_N images. The hidden layer is whole in each program.

    Reads weight1, the images' sums and BLOCK_OUT rows of weight2, mostly from L2.
    """
    out_blocks = tl.cdiv(K, BLOCK_OUT)
    n_offs = (tl.program_id(0) // out_blocks).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    k_offs = (tl.program_id(0) % out_blocks) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    r_offs = tl.arange(0, BLOCK_R)
    # before the loop, to arrive while it runs
    weight2 = matrix_tile(weight2_ptr, k_offs, r_offs, K, R)
    bias1 = load_tile(bias1_ptr, r_offs, r_offs < R)
    acc = first_product(
        sums_ptr, weight1_ptr, n_offs, r_offs, N, C, R, parts, divisor,
        0, tl.cdiv(C, BLOCK_C) * parts, BLOCK_N, BLOCK_C, BLOCK_R, STAGES,
    )  # fmt: skip
    hidden = activate(acc + bias1[None, :], ACT)
    acc = add_product(tl.zeros((BLOCK_N, BLOCK_OUT), tl.float32), hidden, weight2)
    store_logits(out_ptr, acc, bias2_ptr, n_offs, k_offs, N, K, SIGMOID)


@triton.jit(do_not_specialize=["N", "steps", "steps_per_split"])
def excite_hidden_kernel(
    sums_ptr,  # [N, parts, C]
    weight1_ptr,  # [R, C]
    hidden_ptr,  # [splits, N, R]
    N, C, R, parts, divisor, steps, steps_per_split,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The first layer without its bias: BLOCK_R units of BLOCK_N images, over a split of C."""
    r_blocks, n_blocks = tl.cdiv(R, BLOCK_R), tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    r_offs = (pid % r_blocks) * BLOCK_R + tl.arange(0, BLOCK_R)
    rest = pid // r_blocks
    n_offs = (rest % n_blocks).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = rest // n_blocks
    first = split * steps_per_split
    last = tl.minimum(first + steps_per_split, steps)
    acc = first_product(
        sums_ptr, weight1_ptr, n_offs, r_offs, N, C, R, parts, divisor,
        first, last, BLOCK_N, BLOCK_C, BLOCK_R, STAGES,
    )  # fmt: skip
    offs = ((split.to(tl.int64) * N + n_offs) * R)[:, None] + r_offs[None, :]
    tl.store(hidden_ptr + offs, acc, mask=(n_offs < N)[:, None] & (r_offs < R)[None, :])


@triton.jit(do_not_specialize=["N"])
def excite_out_kernel(
    hidden_ptr,  # [SPLITS, N, R]
    bias1_ptr,  # [R]
    weight2_ptr,  # [K, R]
    bias2_ptr,  # [K]
    out_ptr,  # [N, K]
    N, R, K,
    ACT: tl.constexpr, SIGMOID: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_R: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The second layer on what excite_hidden_kernel left: BLOCK_OUT channels of BLOCK_N images."""
    out_blocks = tl.cdiv(K, BLOCK_OUT)
    n_offs = (tl.program_id(0) // out_blocks).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    k_offs = (tl.program_id(0) % out_blocks) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    acc = tl.zeros((BLOCK_N, BLOCK_OUT), tl.float32)
    for start in tl.range(0, R, BLOCK_R, num_stages=STAGES):
        r_offs = start + tl.arange(0, BLOCK_R)
        weight = matrix_tile(weight2_ptr, k_offs, r_offs, K, R)
        hidden = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
        for split in tl.static_range(SPLITS):
            hidden += matrix_tile(hidden_ptr + split * N.to(tl.int64) * R, n_offs, r_offs, N, R)
        hidden += load_tile(bias1_ptr, r_offs, r_offs < R)[None, :]
        acc = add_product(acc, activate(hidden, ACT), weight)
    store_logits(out_ptr, acc, bias2_ptr, n_offs, k_offs, N, K, SIGMOID)
