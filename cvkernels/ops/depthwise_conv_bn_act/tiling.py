"""How the Triton kernel cuts a problem into programs: a rule, since no shape was measured yet."""

from __future__ import annotations

import functools
from typing import NamedTuple

from cvkernels.ops.common.tiles import INT32_MAX, cdiv, power_of_two, sm_count
from cvkernels.ops.depthwise_conv_bn_act.problem import DepthwiseProblem

_ACCESS = 16  # bytes that a thread loads and stores at once
_SECTOR = 32  # bytes that memory delivers at once


class Tiling(NamedTuple):
    """Tile of a program, in rows, columns and channels, and how many bands an image is cut into."""

    block_p: int
    block_q: int
    block_c: int
    bands: int
    band_rows: int
    num_warps: int

    def programs(self, problem: DepthwiseProblem) -> int:
        return problem.N * self.bands * cdiv(problem.C, self.block_c)


@functools.lru_cache(maxsize=4096)
def tiling(problem: DepthwiseProblem, capability: tuple[int, int]) -> Tiling:
    """The tiling for ``problem``.

    A program's tile is as wide as the map, up to 128 columns, and holds one 16-byte access for each
    of its 128 or 256 threads, so that the channels follow from the width: 16 on a map of 112, 128
    on one of 7, in bfloat16; fewer, down to a sector, where a small batch would leave SMs idle.

    One program for each image and block of channels walks the whole map, and its sums are complete,
    where these programs give every SM one. Else maps are cut into bands of rows, and a second,
    small kernel adds the bands' sums. Without sums, bands are free, and maps are cut until every SM
    has four programs.
    """
    itemsize = problem.dtype.itemsize
    vector = _ACCESS // itemsize
    block_q = min(power_of_two(problem.Q), 128)
    # rows that share loads of x, of which a stride leaves fewer; more would not fit the registers
    rows = 4 if problem.stride[0] == 1 else 2
    if itemsize == 4 and problem.R == 5 and rows == 2:
        rows = 3  # two of them spill, at any number of registers
    block_p = min(rows, problem.P)
    sms = sm_count(capability)
    threads = 256 if block_q >= 32 else 128
    block_c = min(vector * threads // block_q, 128, power_of_two(problem.C))

    def programs(width: int) -> int:
        return problem.N * cdiv(problem.C, width) * cdiv(problem.P, block_p)

    def wasteful(width: int) -> bool:
        """More than an eighth of the lanes past the last channel."""
        return 8 * cdiv(problem.C, width) * width > 9 * problem.C

    # not below a sector, nor below an access for each thread of a warp
    least = max(_SECTOR // itemsize, 32 * vector // block_q)
    while block_c > least and (wasteful(block_c) or programs(block_c) < sms):
        block_c //= 2
    threads = max(32, min(256, block_q * block_c // vector))
    enough = sms if problem.squeeze else 4 * sms
    bands = cdiv(enough, max(1, problem.N * cdiv(problem.C, block_c)))
    bands = min(bands, cdiv(problem.P, block_p))
    band_rows = cdiv(cdiv(problem.P, bands), block_p) * block_p
    found = Tiling(block_p, block_q, block_c, cdiv(problem.P, band_rows), band_rows, threads // 32)
    if found.programs(problem) > INT32_MAX:
        raise ValueError(
            f"depthwise_conv_bn_act: {problem.N} images of {problem.C} channels are more than a "
            f"launch can index; split the batch"
        )
    return found
