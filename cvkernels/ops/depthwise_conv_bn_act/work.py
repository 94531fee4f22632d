"""The work of a depthwise convolution's launches, for the time model.

Instructions are counted in the machine code for sm_90 (Triton 3.8), with the norm folded and SiLU;
tests/build/test_launches.py counts them again.
"""

from __future__ import annotations

from cvkernels.ops.common.tiles import cdiv
from cvkernels.ops.common.traffic import Traffic
from cvkernels.ops.common.work import GPU, Work, occupancy, streaming
from cvkernels.ops.depthwise_conv_bn_act import cuda
from cvkernels.ops.depthwise_conv_bn_act.problem import DepthwiseProblem
from cvkernels.ops.depthwise_conv_bn_act.tiling import tiling

# A thread's, for each element of its tile, by the filter's size and the stride.
TRITON = {(3, 1): 49.0, (3, 2): 67.0, (5, 1): 85.0, (5, 2): 131.0}
# Of the CUDA C++ kernel's main loop, with SiLU and sums in bfloat16: tests/build/test_cuda_compile.
CUDA = {(3, 1): 17.9, (3, 2): 25.4, (5, 1): 35.5, (5, 2): 44.1}
REGISTERS = 128


def of(problem: DepthwiseProblem, name: str, gpu: GPU) -> tuple[Work, ...]:
    """The launches of the implementation of this name; none where it is not known."""
    if problem.bytes_written == 0:
        return ()
    if name == "triton":
        return triton(problem, gpu)
    if name == "cuda":
        return cuda_kernel(problem, gpu)
    return ()


def triton(problem: DepthwiseProblem, gpu: GPU) -> tuple[Work, ...]:
    """A program walks a band of rows, tile by tile, and waits for a row of x in each."""
    p, tile, size = problem, tiling(problem, gpu.capability), problem.dtype.itemsize
    threads, stride = 32 * tile.num_warps, p.stride[0]
    tiles = cdiv(tile.band_rows, tile.block_p) * cdiv(p.Q, tile.block_q)
    elements = tiles * tile.block_p * tile.block_q * tile.block_c
    # x again for the rows that two tiles share; its columns are in L1
    rows = (tile.block_p - 1) * stride + p.R
    x = size * tiles * rows * min(tile.block_q, p.Q) * p.stride[1] * tile.block_c
    sums = 4 * p.N * p.C * tile.bands * p.squeeze
    work = Work(
        p.bytes_read,
        p.bytes_written,
        programs=tile.programs(p),
        per_sm=occupancy(gpu, threads, REGISTERS),
        l2=x,
        instructions=elements / 32 * TRITON.get((p.R, stride), TRITON[5, 1]),
        steps=tiles * p.S,
        in_flight=threads * 16 * rows,
    )
    return (work, *(streaming(Traffic(1, sums, 0)) if sums and tile.bands > 1 else ()))


def cuda_kernel(problem: DepthwiseProblem, gpu: GPU) -> tuple[Work, ...]:
    """A block goes down the rows of its bands; rows of x come by copies that run ahead."""
    p, size, stride = problem, problem.dtype.itemsize, problem.stride[0]
    cut = cuda.cut(p, gpu.capability)
    blocks, units = cut.blocks(p), cut.images * cut.bands
    channels = 4 if (size, p.R, stride) == (2, 3, 1) else 2  # of a thread
    # rows of out, those before the first of a band, and the filter
    rows = cut.band_rows + (p.R - 1) / stride + 3
    outputs = cuda.THREADS * cuda.STRIP * channels * rows
    row = cuda.PIXEL * ((cut.strips * cuda.STRIP - 1) * stride + p.R)
    work = Work(
        p.bytes_read,
        p.bytes_written,
        programs=blocks,
        per_sm=cuda.BLOCKS,
        l2=units * row * (cut.band_rows * stride + p.R - stride),
        instructions=outputs / 32 * CUDA.get((p.R, stride), CUDA[5, 1]),
        waits=3,
        in_flight=2 * units * row,
    )
    parts = cut.parts(p)
    sums = 4 * p.N * p.C * parts if p.squeeze and parts > 1 else 0
    return (work, *(streaming(Traffic(1, sums, 4 * p.N * p.C)) if sums else ()))
