"""The work of a depthwise convolution's launches, for the time model.

Instructions are counted in the machine code for sm_90 (Triton 3.8), with the norm folded and SiLU;
tests/build/test_launches.py counts them again.
"""

from __future__ import annotations

from cvkernels.ops.common.tiles import cdiv
from cvkernels.ops.common.traffic import Traffic
from cvkernels.ops.common.work import GPU, Work, occupancy, streaming
from cvkernels.ops.depthwise_conv_bn_act.problem import DepthwiseProblem
from cvkernels.ops.depthwise_conv_bn_act.tiling import tiling

# A thread's, for each element of its tile, by the filter's size and the stride.
TRITON = {(3, 1): 49.0, (3, 2): 67.0, (5, 1): 85.0, (5, 2): 131.0}
# ASSUMED of a kernel with sliding windows in registers, until its code is counted.
CUDA = {(3, 1): 18.0, (3, 2): 26.0, (5, 1): 34.0, (5, 2): 46.0}
REGISTERS = 128


def of(problem: DepthwiseProblem, name: str, gpu: GPU) -> tuple[Work, ...]:
    """The launches of the implementation of this name; none where it is not known."""
    if problem.bytes_written == 0:
        return ()
    if name == "triton":
        return triton(problem, gpu)
    if name == "cuda":
        return (cuda(problem, gpu),)
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


def cuda(problem: DepthwiseProblem, gpu: GPU) -> Work:
    """A thread has 8 channels of a strip of 8 columns and goes down the rows of x."""
    p, size = problem, problem.dtype.itemsize
    vec, strip, threads = 16 // size, 8, 256
    elements = p.N * p.P * cdiv(p.Q, strip) * strip * p.C
    programs = cdiv(p.N * p.C // vec * cdiv(p.Q, strip), threads)
    bands = max(1, min(p.P // 4, cdiv(4 * gpu.sms, programs)))
    programs *= bands
    columns = (strip - 1) * p.stride[1] + p.S
    return Work(
        p.bytes_read,
        p.bytes_written,
        programs=programs,
        per_sm=2,
        l2=p.bytes_read / programs * columns / (strip * p.stride[1]),
        instructions=elements / 32 / programs * CUDA.get((p.R, p.stride[0]), CUDA[5, 1]),
        steps=cdiv(p.P, bands),
        in_flight=threads * 16 * columns,
    )
