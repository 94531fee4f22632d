"""How the work of a Triton launch is cut: tile sizes, and parts of a reduction."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from cvkernels.ops.common.layout import is_nhwc, pixel_stride
from cvkernels.ops.common.tiles import cdiv, power_of_two

# Enough programs that each SM of the largest GPU has four.
PROGRAMS = 512
# Elements of a reduction's tile.
SQUEEZE, BACKWARD = 4096, 2048
# The hidden layer that excite_kernel keeps in registers.
LARGEST_R = 512

# One program makes a whole image where that stays in an SM's caches, as SENet's 7x7 maps do in half
# precision, and where there are images for half of the SMs of the largest GPU: a rule, since none
# was measured yet.
IMAGE_BYTES, IMAGE_R, IMAGES = 208 * 1024, 128, 66


class Tile(NamedTuple):
    """BLOCK_P pixels and BLOCK_C channels; parts of pixels_per_part pixels each."""

    vec: int
    block_p: int
    block_c: int
    pixels_per_part: int
    parts: int


def elementwise(C: int, HW: int, vec: int, widest: int = 128) -> Tile:
    block_c = _block_c(C, widest)
    block_p = max(1, min(4096 // block_c, power_of_two(HW)))
    return Tile(vec, block_p, block_c, HW, 1)


def reduction(N: int, C: int, HW: int, vec: int, elements: int) -> Tile:
    """A tile of about ``elements``, and as many parts as fill the GPU."""
    block_c = _block_c(C, 64)
    block_p = max(1, min(elements // block_c, power_of_two(HW), 64))
    wanted = cdiv(PROGRAMS, max(1, N * cdiv(C, block_c)))
    parts = max(1, min(wanted, cdiv(HW, 2 * block_p)))
    pixels = cdiv(cdiv(HW, parts), block_p) * block_p
    return Tile(vec, block_p, block_c, pixels, cdiv(HW, pixels))


def planes(HW: int, elements: int) -> tuple[int, int]:
    """(BLOCK_ROWS, BLOCK_P) of dense planes."""
    block_p = min(power_of_two(HW), 1024)
    return max(1, elements // block_p), block_p


def one_launch(x: Tensor, R: int) -> bool:
    """Whether one program makes a whole image of squeeze_excite."""
    N, C, H, W = x.shape
    fits = C * H * W * x.element_size() <= IMAGE_BYTES and R <= IMAGE_R
    return is_nhwc(x) and fits and N >= IMAGES


def block_r(R: int) -> int:
    return max(16, power_of_two(R))


def excite(N: int, C: int, R: int) -> tuple[int, int]:
    """(BLOCK_C, programs per image)."""
    block_c = max(16, min(4096 // block_r(R), 128))
    splits = min(cdiv(C, 4 * block_c), max(1, PROGRAMS // (4 * max(1, N))))
    return block_c, splits


def vec_of(*maps: Tensor | None) -> int:
    """8 where channels and strides are multiples of it, so that accesses are 16 bytes; else 1."""
    for x in maps:
        if x is None:
            continue
        steps = (x.shape[1], x.stride(0), pixel_stride(x))
        if any(step is None or step % 8 for step in steps):
            return 1
    return 8


def parts_of(x: Tensor, elements: int = SQUEEZE) -> int:
    """In how many parts a reduction of x is summed, the squeeze or another one."""
    N, C, H, W = x.shape
    return reduction(N, C, H * W, 1, elements).parts if is_nhwc(x) else 1


def _block_c(C: int, largest: int) -> int:
    """The widest block of channels that is not mostly past the end."""
    sizes = [size for size in (128, 64, 32, 16) if size <= largest]
    padded = {size: cdiv(C, size) * size for size in sizes}
    for size in sizes:
        if 8 * padded[size] <= 9 * C:
            return size
    return min(sizes, key=lambda size: (padded[size], -size))
