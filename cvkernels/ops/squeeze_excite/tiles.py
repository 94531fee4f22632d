"""How the work of a Triton launch is cut: tile sizes, and parts of a reduction."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from cvkernels import backend as backends
from cvkernels.ops.common.layout import is_nhwc, pixel_stride
from cvkernels.ops.common.tiles import cdiv, power_of_two, sm_count


class Pass(NamedTuple):
    """Bytes of a program's tile of a map, how many programs of 128 threads keep an SM busy, and the
    registers that a thread may take: without a limit ptxas aims at fewer, and spills to get there.
    """

    bytes: int
    resident: int
    registers: int

    def elements(self, itemsize: int) -> int:
        return self.bytes // itemsize


SQUEEZE, SCALE, BACKWARD = Pass(8192, 4, 64), Pass(8192, 6, 80), Pass(4096, 5, 96)
# Steps whose loads are under way together, of a squeeze and of a product.
SQUEEZE_STAGES, PRODUCT_STAGES = 3, 3
# Of weight1 and the sums, what one program may read where each of one launch makes the hidden layer
# anew: at an SM's share of L2's rate less than a second launch costs.
HIDDEN_BYTES = 96 * 1024
# Parts of the first layer that a program of the second one adds.
MOST_SPLITS = 8


class Tile(NamedTuple):
    """BLOCK_P pixels and BLOCK_C channels; parts of pixels_per_part pixels each."""

    vec: int
    block_p: int
    block_c: int
    pixels_per_part: int
    parts: int


class Layers(NamedTuple):
    """Tiles of excite's products, of block_n images each.

    The first product has block_r units and steps of block_c channels of a part, the second has
    block_out channels and steps of block_r units. Without ``splits`` one launch makes both.
    """

    block_n: int
    block_c: int
    block_r: int
    block_out: int
    splits: int
    steps: int
    steps_per_split: int

    @property
    def launches(self) -> int:
        return 2 if self.splits else 1


def sms_of(x: Tensor) -> int:
    """Multiprocessors of the GPU that a call on x is planned for."""
    return sm_count(backends.gpu(x)[1])


def elementwise(C: int, HW: int, itemsize: int, vec: int) -> Tile:
    block_c = _block_c(C, 128)
    block_p = max(1, min(SCALE.elements(itemsize) // block_c, power_of_two(HW)))
    return Tile(vec, block_p, block_c, HW, 1)


def reduction(shape: tuple[int, ...], itemsize: int, vec: int, of: Pass, sms: int) -> Tile:
    """A tile of a map, and as many parts as keep all SMs busy."""
    N, C, HW = shape[0], shape[1], shape[2] * shape[3]
    block_c = _block_c(C, 64)
    block_p = min(of.elements(itemsize) // max(block_c, 32), power_of_two(HW))
    steps = _steps(max(1, N * cdiv(C, block_c)), cdiv(HW, block_p), of.resident, sms)
    return Tile(vec, block_p, block_c, steps * block_p, cdiv(HW, steps * block_p))


def planes(HW: int, itemsize: int, of: Pass) -> tuple[int, int]:
    """(BLOCK_ROWS, BLOCK_P) of dense planes."""
    block_p = min(power_of_two(HW), 1024)
    return max(1, of.elements(itemsize) // block_p), block_p


def excite(N: int, parts: int, C: int, R: int, K: int, itemsize: int, sms: int) -> Layers:
    """The tiles for weights of ``itemsize`` bytes, means in ``parts`` and K gates."""
    # 16 rows are the least of a product, and more images share what is read of the weights
    block_n = 16 if N <= 512 else 64
    n_blocks = cdiv(max(1, N), block_n)
    block_c = min(128 if itemsize == 2 else 64, max(16, power_of_two(C)))
    steps = parts * cdiv(C, block_c)
    images = min(N, block_n)
    if R <= 64 and parts * C * (R * itemsize + images * 4) <= HIDDEN_BYTES:
        block_out = min(64, max(16, power_of_two(K)))
        return Layers(block_n, block_c, max(16, power_of_two(R)), block_out, 0, steps, steps)
    block_r = 32
    wanted = sms // (n_blocks * cdiv(R, block_r))
    per_split = cdiv(steps, max(1, min(wanted, MOST_SPLITS)))
    block_out = 128 if itemsize == 2 else 64
    while block_out > 32 and n_blocks * cdiv(K, block_out) < sms // 2:
        block_out //= 2
    return Layers(block_n, block_c, block_r, block_out, cdiv(steps, per_split), steps, per_split)


def vec_of(*maps: Tensor | None) -> int:
    """8 where channels and strides are multiples of it, so that accesses are 16 bytes; else 1."""
    for x in maps:
        if x is None:
            continue
        steps = (x.shape[1], x.stride(0), pixel_stride(x))
        if any(step is None or step % 8 for step in steps):
            return 1
    return 8


def parts_of(x: Tensor, sms: int, of: Pass = SQUEEZE) -> int:
    """In how many parts a reduction of x is summed, the squeeze or another one."""
    return reduction(x.shape, x.element_size(), 1, of, sms).parts if is_nhwc(x) else 1


def _steps(programs: int, steps: int, resident: int, sms: int) -> int:
    """Of the ``steps`` of each of ``programs``, how many a part has, at least two: the most with
    which nine tenths of the SMs' time are used, by ``resident`` programs or more, as many on each.
    """

    def used(of_part: int) -> float:
        made = programs * cdiv(steps, of_part)
        return min(1.0, made / sms / resident) * made / sms / cdiv(made, sms)

    most = max(1, min(cdiv(steps, 2), 4 * resident * sms // programs))
    possible = [cdiv(steps, parts) for parts in range(1, most + 1)]
    return next((of_part for of_part in possible if used(of_part) >= 0.9), max(possible, key=used))


def _block_c(C: int, largest: int) -> int:
    """The widest block of channels that is not mostly past the end."""
    sizes = [size for size in (128, 64, 32, 16) if size <= largest]
    padded = {size: cdiv(C, size) * size for size in sizes}
    for size in sizes:
        if 8 * padded[size] <= 9 * C:
            return size
    return min(sizes, key=lambda size: (padded[size], -size))
