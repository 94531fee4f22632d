"""The work of a convolution's launch, by the implementation that runs it, for the time model.

Instructions are counted in the machine code for sm_90 (Triton 3.8), for channels in multiples of 8;
tests/build/test_launches.py counts them again.
"""

from __future__ import annotations

import math

import torch

from cvkernels.ops.common.tiles import cdiv, power_of_two
from cvkernels.ops.common.work import GPU, TF32_SHARE, Work, mma_sync_share, occupancy
from cvkernels.ops.conv_bn_act import halo as halo_kernel
from cvkernels.ops.conv_bn_act import tiles
from cvkernels.ops.conv_bn_act.problem import Problem
from cvkernels.ops.conv_bn_act.tiles import Config

# Of a warp in a K step: as such, for each 16-byte access of a thread to x and to the weight, and
# for each element of x that passes through registers for a prologue.
STEP = {"1x1": 58, "spatial": 65, "filter_row": 26}
OF_X, OF_WEIGHT = (
    {"1x1": 3.0, "spatial": 13.0, "filter_row": 5.0},
    {"1x1": 3.0, "spatial": 2.5, "filter_row": 5.0},
)
INPUT_BN, INPUT_GATE = 3.8, 1.4
# Of a warp outside of the loop: as such, and for each element of its tile in a thread.
SETUP = {"1x1": 217, "spatial": 382, "filter_row": 132}
PROJECTION_SETUP = 200
ELEMENT, RESIDUAL, OUTPUT_GATE = 4.0, 5.0, 5.0
ACTS = {"none": 0.0, "relu": 0.0, "relu6": 1.0, "silu": 3.0}
ACTS_OF_OTHERS = {torch.float16: {"silu": 5.0}, torch.float32: {"silu": 11.0}}
# ASSUMED: the share of the matrix rate that cuDNN's fused convolutions reach, from 128 output
# channels on and below; that they read their output, whose old value they multiply by 0; that they
# split the sum over few tiles.
CUDNN_SHARE, CUDNN_SHARE_NARROW, CUDNN_SPLITS = 0.62, 0.45, 4


def of(problem: Problem, name: str, tile: Config | None, gpu: GPU) -> tuple[Work, ...]:
    """The launches of the implementation of this name, and of Triton with this tile; none where it
    is not known."""
    if problem.bytes_written == 0:
        return ()
    if name == "cudnn":
        return (cudnn(problem, gpu),)
    if name.startswith("halo"):
        return (halo(problem, name, gpu),)
    return () if tile is None else by_tile(problem, tile, gpu)


def by_tile(problem: Problem, tile: Config, gpu: GPU) -> tuple[Work, ...]:
    """The launches of Triton with this tile."""
    work = triton(problem, tile, gpu)
    return (work,) if tile.split_k == 1 else split(problem, work, tile.split_k)


def split(problem: Problem, work: Work, splits: int) -> tuple[Work, Work]:
    """The launch of ``work`` with its sums in float32 and in parts, and one that adds these."""
    p, steps = problem, cdiv(work.steps, splits)
    parts = 4 * splits * p.N * p.P * p.Q * p.K
    residual = p.bytes_written * p.has_residual
    share = steps / work.steps
    first = work._replace(
        read=p.bytes_read - residual,
        written=parts,
        programs=work.programs * splits,
        flops=work.flops * share,
        l2=work.l2 * share,
        shared=work.shared * share,
        instructions=(work.instructions - work.last) * share + work.last,
        steps=steps,
        waits=2,
    )
    programs = cdiv(p.N * p.P * p.Q, 8) * cdiv(p.K, 64)
    read = (parts + residual) / programs
    second = Work(
        parts + residual, p.bytes_written, programs, per_sm=10, l2=read, waits=2, in_flight=read,
        dependent=work.dependent,
    )  # fmt: skip
    return first, second


def triton(problem: Problem, tile: Config, gpu: GPU) -> Work:
    """A program makes a tile of BLOCK_M pixels and BLOCK_N channels.

    x and the weight pass through shared memory, from where the matrix units read 64 rows of x, and
    for each 64 rows the weight; for the store the tile passes through it too.
    """
    p, kind, size = problem, tiles.kernel(problem), problem.dtype.itemsize
    m, n, k = tile.block_m, tile.block_n, tile.block_k
    taps, channels = p.R * p.S, tiles.group_span(p, n)
    projected = p.projection.C if p.projection else 0
    steps = taps * cdiv(channels, k) + cdiv(projected, k)
    if kind == "filter_row":
        k, steps = power_of_two(max(p.S * p.C, 16)), p.R
    threads = 32 * tile.num_warps
    tiles_n = cdiv(p.K, n)
    columns = p.K / tiles_n
    buffered = size * (m + n) * k
    rows = (
        taps * channels + projected if kind != "filter_row" else p.R * p.C * p.stride[1] + p.S * p.C
    )
    residual = size * m * columns * p.has_residual
    lanes = math.gcd(16 // size, p.C)
    of_x, of_weight = m * k / threads / lanes, n * k / threads / lanes
    elements = m * k / threads * (p.has_input_bn * INPUT_BN + p.has_input_gate * INPUT_GATE)
    step = STEP[kind] + OF_X[kind] * of_x + OF_WEIGHT[kind] * of_weight + elements
    act = ACTS_OF_OTHERS.get(p.dtype, ACTS).get(p.act, ACTS[p.act])
    each = ELEMENT + act + RESIDUAL * p.has_residual + OUTPUT_GATE * p.has_output_gate
    setup = SETUP[kind] + PROJECTION_SETUP * (p.projection is not None)
    last = tile.num_warps * (setup + each * m * n / threads)
    stages = 1 if kind == "filter_row" else min(tile.num_stages, steps + 1)
    late = (p.has_residual and n > 64) + p.has_output_gate
    return Work(
        p.bytes_read,
        p.bytes_written,
        programs=tiles.programs(p, tile),
        per_sm=occupancy(
            gpu, threads, registers(p, tile, of_x + of_weight, gpu), stages * buffered
        ),
        flops=2 * m * n * k * steps,
        matrix_share=1.0 if size == 2 else TF32_SHARE,
        l2=size * (m * rows + columns * (taps * channels + projected)) + residual,
        shared=steps * (buffered + size * m // 64 * (64 + n) * k)
        + m * n * size * (4 if p.has_residual else 2),
        instructions=tile.num_warps * steps * step + last,
        last=last,
        steps=steps,
        waits=2 + late,
        in_flight=max(1, stages - 1) * size * (m + n) * min(k, channels * taps) + residual / 2,
        dependent=gpu.capability >= (9, 0),
    )


def registers(problem: Problem, tile: Config, accesses: float, gpu: GPU) -> int:
    """Of a thread, at most: sums, addresses, elements of a prologue; the compiler has its way."""
    p, threads = problem, 32 * tile.num_warps
    sums = tile.block_m * tile.block_n // threads
    through = tile.block_m * tile.block_k / threads
    through = 1.25 * through * p.has_input_bn + (30 + 0.4 * through) * p.has_input_gate
    base = {"1x1": 24, "spatial": 32, "filter_row": 26}[tiles.kernel(p)]
    base += 20 * (p.projection is not None)
    # of few elements the compiler keeps more of the loop
    base += 40 * (p.has_input_bn and tile.num_warps == 4)
    limit = (
        255
        if tiles.alone(tile.block_m, tile.block_n)
        else tiles.registers(tile.num_warps, p.dtype.itemsize, gpu.capability)
    )
    return int(min(sums + base + 4 * accesses + through, limit))


def cudnn(problem: Problem, gpu: GPU) -> Work:
    """ASSUMED, see the constants: tiles of 128 x 128, or of 64 x 64 where these are few."""
    p, size = problem, problem.dtype.itemsize
    pixels, depth = p.N * p.P * p.Q, p.R * p.S * p.C // p.groups

    def programs(side: int) -> int:
        return cdiv(pixels, side) * cdiv(p.K, side)

    side = 128 if programs(128) >= gpu.sms else 64
    splits = CUDNN_SPLITS if programs(side) < gpu.sms // 2 else 1
    wide = min(side, power_of_two(p.K))
    share = CUDNN_SHARE if p.K >= 128 else CUDNN_SHARE_NARROW
    return Work(
        p.bytes_read + p.bytes_written,
        p.bytes_written,
        programs=programs(side) * splits,
        per_sm=1,
        flops=2 * side * wide * depth / splits,
        matrix_share=share if size == 2 else share * TF32_SHARE,
        steps=cdiv(depth, 64 * splits),
        waits=2,
        in_flight=3 * size * (side + wide) * 64,
    )


def halo(problem: Problem, name: str, gpu: GPU) -> Work:
    """A block an SM goes through its tiles, the next one's patch on its way meanwhile."""
    possible = halo_kernel.tiles(problem, gpu.capability)
    tile = next((t for t in possible if t.name == name), possible[0])
    each, count = halo_kernel.clocks(problem, tile), halo_kernel.tiles_of(problem, tile)
    return Work(
        problem.bytes_read,
        problem.bytes_written,
        programs=count,
        flops=2 * each.products * halo_kernel.PAIRS,
        matrix_share=mma_sync_share(gpu) * halo_kernel.UTILISATION,
        l2=(halo_kernel.map_bytes(problem, tile) - problem.bytes_written) / count,
        shared=each.shared * halo_kernel.SHARED_BYTES,
        instructions=each.issues * halo_kernel.ISSUES,
        waits=0,
        in_flight=(tile.stages - 1) * tile.stage_bytes,
    )
