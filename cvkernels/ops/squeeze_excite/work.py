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

# Threads of a program, and registers of one of a product's.
THREADS, PRODUCT_REGISTERS = 128, 192
# Of a warp, and of a thread for each element of the tiles that its program goes through.
SQUEEZE_SETUP, SQUEEZE = 280, 4.1
SCALE, RESIDUAL = 8.8, 2.7
PRODUCT_SETUP, PRODUCT_STEP, PRODUCT = 350, 40, 2.4


def squeeze(x: Tensor, gpu: GPU) -> Work:
    """A program adds the pixels of a part of an image, tile by tile."""
    N, C = x.shape[:2]
    size, of = x.element_size(), tiles.SQUEEZE
    tile = tiles.reduction(x.shape, size, tiles.vec_of(x), of, gpu.sms)
    loops = cdiv(tile.pixels_per_part, tile.block_p)
    elements = loops * tile.block_p * tile.block_c
    return Work(
        nbytes(x),
        4 * N * tile.parts * C,
        programs=N * tile.parts * cdiv(C, tile.block_c),
        per_sm=occupancy(gpu, THREADS, of.registers),
        l2=size * elements,
        instructions=THREADS / 32 * SQUEEZE_SETUP + elements / 32 * SQUEEZE,
        steps=loops,
        in_flight=min(loops, tiles.SQUEEZE_STAGES) * size * tile.block_p * tile.block_c,
    )


def finish(x: Tensor, gpu: GPU) -> tuple[Work, ...]:
    """The sum of the parts, where there are several: a small launch."""
    N, parts, C = x.shape[0], tiles.parts_of(x, gpu.sms), x.shape[1]
    if parts == 1:
        return ()
    small = Work(4 * N * parts * C, 4 * N * C, N * cdiv(C, 256), 8, steps=parts, in_flight=1024)
    return (small,)


def excite(N: int, parts: int, problem: Problem, gpu: GPU) -> tuple[Work, ...]:
    """Two products: a program has some images and some units or channels of a layer. In one launch
    each program makes the hidden layer anew."""
    weight1, R, K = problem.layers[0], problem.R, problem.K
    C, size = weight1.shape[1], weight1.element_size()
    tile = tiles.excite(N, parts, C, R, K, size, gpu.sms)
    images = cdiv(N, tile.block_n)
    read = 4 * N * parts * C
    of_sums, of_hidden = 4 * tile.block_n * tile.block_c, 4 * tile.block_n * tile.block_r
    first = of_sums + size * tile.block_r * tile.block_c
    second = of_hidden * max(1, tile.splits) + size * tile.block_r * tile.block_out
    more = cdiv(R, tile.block_r)
    weights = [nbytes(*layer) for layer in (problem.layers[:2], problem.layers[2:])]

    def product(programs: int, steps: int, step: int, read: float, written: float) -> Work:
        return Work(
            read,
            written,
            programs=programs,
            per_sm=occupancy(gpu, THREADS, PRODUCT_REGISTERS, tiles.PRODUCT_STAGES * step),
            l2=steps * step,
            instructions=THREADS / 32 * (PRODUCT_SETUP + steps * PRODUCT_STEP)
            + steps * step / size / 32 * PRODUCT,
            steps=cdiv(steps, tiles.PRODUCT_STAGES),
            waits=2,
            in_flight=min(steps, tiles.PRODUCT_STAGES) * step,
        )

    out = images * cdiv(K, tile.block_out)
    if not tile.splits:
        steps = tile.steps + more
        step = cdiv(tile.steps * first + more * second, steps)
        return (product(out, steps, step, read + sum(weights), 4 * N * K),)
    hidden = 4 * N * R * tile.splits
    made = images * more * tile.splits
    return (
        product(made, tile.steps_per_split, first, read + weights[0], hidden),
        product(out, more, second, hidden + weights[1], 4 * N * K),
    )


def scale(x: Tensor, residual: Tensor | None, gpu: GPU) -> Work:
    """A program scales a tile; all its loads are in flight at once."""
    N, C, H, W = x.shape
    tile = tiles.elementwise(C, H * W, x.element_size(), tiles.vec_of(x, residual))
    elements = tile.block_p * tile.block_c
    each = SCALE + RESIDUAL * (residual is not None)
    maps = 1 + (residual is not None)
    return Work(
        nbytes(x, residual),
        nbytes(x),
        programs=N * cdiv(H * W, tile.block_p) * cdiv(C, tile.block_c),
        per_sm=occupancy(gpu, THREADS, tiles.SCALE.registers),
        l2=maps * x.element_size() * elements,
        instructions=elements / 32 * each,
        waits=2,
        in_flight=maps * x.element_size() * elements,
    )


def squeeze_excite(problem: Problem, x: Tensor, gpu: GPU) -> tuple[Work, ...]:
    """The launches of the whole block."""
    logits = excite(x.shape[0], tiles.parts_of(x, gpu.sms), problem, gpu)
    return (squeeze(x, gpu), *logits, scale(x, problem.residual, gpu))
