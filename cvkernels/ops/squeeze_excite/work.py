"""The work of squeeze-and-excitation's launches, by what they are, for the time model.

Instructions are counted in the machine code for sm_90 (Triton 3.8).
"""

from __future__ import annotations

from torch import Tensor

from cvkernels.ops.common.tiles import cdiv
from cvkernels.ops.common.traffic import nbytes
from cvkernels.ops.common.work import GPU, Work, occupancy
from cvkernels.ops.squeeze_excite import tiles
from cvkernels.ops.squeeze_excite.problem import Problem

# Registers of a thread, and threads of a program.
REGISTERS, EXCITE_REGISTERS, THREADS = 72, 96, 128
# Of a warp, and of a thread for each element of the tiles that its program goes through.
SQUEEZE_SETUP, SQUEEZE = 280, 4.1
SCALE, RESIDUAL = 8.8, 2.7
EXCITE_SETUP, EXCITE = 400, 6.0
IMAGE = 50.0


def squeeze(x: Tensor, gpu: GPU) -> Work:
    """A program adds the pixels of a part of an image, tile by tile."""
    N, C, H, W = x.shape
    tile = tiles.reduction(N, C, H * W, tiles.vec_of(x), tiles.SQUEEZE)
    loops = cdiv(tile.pixels_per_part, tile.block_p)
    elements = loops * tile.block_p * tile.block_c
    return Work(
        nbytes(x),
        4 * N * tile.parts * C,
        programs=N * tile.parts * cdiv(C, tile.block_c),
        per_sm=occupancy(gpu, THREADS, REGISTERS),
        l2=x.element_size() * elements,
        instructions=THREADS / 32 * SQUEEZE_SETUP + elements / 32 * SQUEEZE,
        steps=loops,
        in_flight=x.element_size() * tile.block_p * tile.block_c,
    )


def finish(x: Tensor, gpu: GPU) -> tuple[Work, ...]:
    """The sum of the parts, where there are several: a small launch."""
    N, parts, C = x.shape[0], tiles.parts_of(x), x.shape[1]
    if parts == 1:
        return ()
    small = Work(4 * N * parts * C, 4 * N * C, N * cdiv(C, 256), 8, steps=parts, in_flight=1024)
    return (small,)


def excite(N: int, C: int, R: int, parts: int, weights: int, gpu: GPU) -> Work:
    """A program has an image's hidden layer, or one of several: two loads wait in each block."""
    block_c, splits = tiles.excite(N, C, R)
    blocks, mine = cdiv(C, block_c), cdiv(cdiv(C, splits), block_c)
    products = block_c * tiles.block_r(R) * (blocks + mine)
    return Work(
        weights + 4 * N * parts * C,
        4 * N * C,
        programs=N * splits,
        per_sm=occupancy(gpu, THREADS, EXCITE_REGISTERS),
        l2=weights * (blocks + mine) / (2 * blocks),
        instructions=THREADS / 32 * EXCITE_SETUP + products / 32 * EXCITE,
        steps=blocks + mine,
        in_flight=block_c * tiles.block_r(R) * 2,
    )


def scale(x: Tensor, residual: Tensor | None, gpu: GPU) -> Work:
    """A program scales a tile; all its loads are in flight at once."""
    N, C, H, W = x.shape
    tile = tiles.elementwise(C, H * W, tiles.vec_of(x, residual))
    elements = tile.block_p * tile.block_c
    each = SCALE + RESIDUAL * (residual is not None)
    maps = 1 + (residual is not None)
    return Work(
        nbytes(x, residual),
        nbytes(x),
        programs=N * cdiv(H * W, tile.block_p) * cdiv(C, tile.block_c),
        per_sm=occupancy(gpu, THREADS, REGISTERS),
        l2=maps * x.element_size() * elements,
        instructions=elements / 32 * each,
        waits=2,
        in_flight=maps * x.element_size() * elements,
    )


def image(x: Tensor, residual: Tensor | None, weights: int, gpu: GPU) -> Work:
    """A program makes an image: of each block of channels two dependent loads, and then three."""
    N, C, H, W = x.shape
    tile = tiles.elementwise(C, H * W, tiles.vec_of(x, residual), widest=64)
    blocks = cdiv(C, tile.block_c)
    return Work(
        nbytes(x, residual) + weights,
        nbytes(x),
        programs=N,
        per_sm=occupancy(gpu, 2 * THREADS, REGISTERS),
        l2=(2 * nbytes(x) + nbytes(residual)) / N + weights,
        instructions=blocks * tile.block_p * tile.block_c / 32 * IMAGE,
        steps=7 * blocks,
        in_flight=2 * x.element_size() * tile.block_p * tile.block_c,
    )


def squeeze_excite(problem: Problem, x: Tensor, gpu: GPU) -> tuple[Work, ...]:
    """The launches of the whole block, one or three."""
    (N, C), residual, weights = x.shape[:2], problem.residual, nbytes(*problem.layers)
    if tiles.one_launch(x, problem.R):
        return (image(x, residual, weights, gpu),)
    logits = excite(N, C, problem.R, tiles.parts_of(x), weights, gpu)
    return (squeeze(x, gpu), logits, scale(x, residual, gpu))
